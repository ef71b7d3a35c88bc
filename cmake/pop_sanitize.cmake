# POP_SANITIZE, for tests: every C++ source under those sanitizers of the compiler, and the operators of
# tests/sanitizers/planted_faults.cpp, whose faults show that they are caught. A finding ends the process, with a stack.
# Optimised little, since that more than halves the time to compile.
set(POP_SANITIZE "" CACHE STRING "For tests: sanitizers of the compiler, such as address,undefined")

if(POP_SANITIZE MATCHES "thread")  # before the options, which are not for it
  add_library(visible_openmp SHARED tests/sanitizers/visible_openmp.cpp)
  target_link_libraries(visible_openmp PRIVATE ${CMAKE_DL_LIBS})
endif()
if(POP_SANITIZE)
  set(POP_KERNEL_OPTIMIZATION -O1)
  set(sanitizer_options -O1 -fsanitize=${POP_SANITIZE} -fno-omit-frame-pointer -g1)
  if(POP_SANITIZE MATCHES "undefined")
    list(APPEND sanitizer_options -fno-sanitize-recover=undefined)
  endif()
  add_compile_options(${sanitizer_options})
  add_link_options(${sanitizer_options})
  set(POP_PLANTED_FAULTS tests/sanitizers/planted_faults.cpp)
else()
  set(POP_KERNEL_OPTIMIZATION -O3)
  set(POP_PLANTED_FAULTS)
endif()
