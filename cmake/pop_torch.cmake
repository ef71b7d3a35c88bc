# The target torch_stable: the headers of the torch that is installed, and the one library of it that _ops links.
#
# Not find_package(Torch): on a CUDA build of torch that searches for a CUDA toolkit. With `-I` Python ignores
# pip's build overlay, so the torch of the environment is preferred to one fetched for the build.
set(script "import os, torch; print(torch.__version__, os.path.dirname(torch.__file__), sep=';')")
foreach(isolated -I "")
  execute_process(COMMAND ${Python_EXECUTABLE} ${isolated} -c "${script}"
    OUTPUT_VARIABLE found ERROR_VARIABLE error OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status)
  if(status EQUAL 0)
    break()
  endif()
endforeach()
if(NOT status EQUAL 0)
  message(FATAL_ERROR "pop_ext compiles against torch's headers, and ${Python_EXECUTABLE} cannot import torch:\n${error}")
endif()
list(GET found 0 POP_TORCH_VERSION)
list(GET found 1 torch_folder)
if(POP_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "pop_ext needs torch >= 2.11, ${Python_EXECUTABLE} has ${POP_TORCH_VERSION}")
endif()
message(STATUS "torch ${POP_TORCH_VERSION} in ${torch_folder}")

add_library(torch_stable SHARED IMPORTED)
set_target_properties(torch_stable PROPERTIES
  IMPORTED_LOCATION ${torch_folder}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}torch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}
  INTERFACE_INCLUDE_DIRECTORIES ${torch_folder}/include)
# The ABI of torch 2.11, and an #error from every torch header outside of the stable set.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000ULL TORCH_STABLE_ONLY)
