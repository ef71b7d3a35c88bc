# The CUDA kernels. Sets POP_WITH_CUDA and POP_CUDA_VERSION (empty without CUDA), says which of the two was built, and
# makes the target pop_cuda: the kernels, and what those who call them need.
set(POP_CUDA_SOURCES
  cuda/attention.cu
  cuda/embed.cu
  cuda/gated_act.cu
  cuda/place_rows.cu
  cuda/rms_norm.cu
  cuda/rope_cache_write.cu
  cuda/skinny_gemm.cu)
set(POP_WITH_CUDA OFF)
set(POP_CUDA_VERSION "")

if(NOT POP_CUDA MATCHES "^(AUTO|ON|OFF|SHIM)$")
  message(FATAL_ERROR "POP_CUDA: expected AUTO, ON, OFF or SHIM, got ${POP_CUDA}")
endif()

# For tests: the kernels as C++ on the CPU, in the CPU backend's place (tests/cuda_shim).
function(pop_add_cuda_shim)
  set_source_files_properties(${POP_CUDA_SOURCES} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
  add_library(pop_cuda STATIC ${POP_CUDA_SOURCES} tests/cuda_shim/cuda_shim.cpp tests/cuda_shim/device_shim.cpp)
  target_include_directories(pop_cuda PUBLIC tests/cuda_shim)
  target_compile_definitions(pop_cuda PUBLIC POP_WITH_CUDA POP_CUDA_SHIM)
endfunction()

function(pop_add_cuda)
  find_package(CUDAToolkit REQUIRED)
  add_library(pop_cuda STATIC ${POP_CUDA_SOURCES} cuda/device.cu)
  # A spill or a stack frame in a kernel is a fault: ptxas says so.
  target_compile_options(pop_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings
    -Xptxas=--warn-on-spills,--warn-on-local-memory-usage>)
  target_link_libraries(pop_cuda PUBLIC CUDA::cudart_static)
  target_compile_definitions(pop_cuda PUBLIC POP_WITH_CUDA)
endfunction()

if(POP_CUDA STREQUAL "OFF")
  message(STATUS "CUDA kernels: not built (POP_CUDA=OFF)")
elseif(POP_CUDA STREQUAL "SHIM")
  pop_add_cuda_shim()
  set(POP_WITH_CUDA ON)
  message(STATUS "CUDA kernels: built as C++ for tests on a CPU (POP_CUDA=SHIM)")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES ${POP_CUDA_ARCHITECTURES})
    set(CMAKE_CUDA_STANDARD 20)
    enable_language(CUDA)
    pop_add_cuda()
    set(POP_WITH_CUDA ON)
    set(POP_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
    message(STATUS "CUDA kernels: built with nvcc ${POP_CUDA_VERSION} for ${POP_CUDA_ARCHITECTURES}")
  elseif(POP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "POP_CUDA=ON, and no nvcc was found: put it on PATH or set CMAKE_CUDA_COMPILER")
  else()
    message(STATUS "CUDA kernels: not built (no nvcc found; POP_CUDA=ON makes that an error)")
  endif()
endif()
