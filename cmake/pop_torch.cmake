# The target torch_stable: the headers of the installed torch, and the one of its libraries that _ops links.
#
# find_package(Torch) is not used: with a CUDA build of torch it searches for a CUDA toolkit. The torch of the environment
# (-I) is preferred to one that pip fetched for the build.
foreach(isolated -I "")
  execute_process(COMMAND ${Python_EXECUTABLE} ${isolated} ${CMAKE_CURRENT_SOURCE_DIR}/build_backend/find_torch.py
    OUTPUT_VARIABLE found ERROR_VARIABLE reason RESULT_VARIABLE status
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(status EQUAL 0)
    break()
  endif()
endforeach()
if(NOT status EQUAL 0)
  message(FATAL_ERROR "pop_ext compiles against the headers of torch >= 2.11, and for ${Python_EXECUTABLE} ${reason}")
endif()
list(GET found 0 POP_TORCH_VERSION)
list(GET found 1 torch_folder)
message(STATUS "torch ${POP_TORCH_VERSION} in ${torch_folder}")

add_library(torch_stable SHARED IMPORTED)
set_target_properties(torch_stable PROPERTIES
  IMPORTED_LOCATION ${torch_folder}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}torch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}
  INTERFACE_INCLUDE_DIRECTORIES ${torch_folder}/include)
# Use the ABI of torch 2.11; every torch header outside of the stable set is an #error.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000ULL TORCH_STABLE_ONLY)
