# The CUDA kernels. Sets POP_WITH_CUDA and POP_CUDA_VERSION (empty without CUDA), reports the choice, and makes the target
# pop_cuda: the kernels, and the settings that their callers need.
set(POP_CUDA_SOURCES
  cuda/attention.cu
  cuda/add_features.cu
  cuda/embed.cu
  cuda/gated_act.cu
  cuda/kv_project_sm90.cu
  cuda/build_row_tables.cu
  cuda/quantize_rows.cu
  cuda/rms_norm.cu
  cuda/rope_cache_write.cu
  cuda/route.cu
  cuda/skinny_gemm.cu
  cuda/skinny_mma.cu)
set(POP_CUDA_CHECKS
  tests/gpu/cuda_shim/check_attention.cpp
  tests/gpu/cuda_shim/check_add_features.cpp
  tests/gpu/cuda_shim/check_embed.cpp
  tests/gpu/cuda_shim/check_gated_act.cpp
  tests/gpu/cuda_shim/check_kv_project_sm90.cpp
  tests/gpu/cuda_shim/check_kv_project_tile.cpp
  tests/gpu/cuda_shim/check_main.cpp
  tests/gpu/cuda_shim/check_build_row_tables.cpp
  tests/gpu/cuda_shim/check_quantize_rows.cpp
  tests/gpu/cuda_shim/check_rms_norm.cpp
  tests/gpu/cuda_shim/check_rope_cache_write.cpp
  tests/gpu/cuda_shim/check_route.cpp
  tests/gpu/cuda_shim/check_skinny_gemm.cpp)
set(POP_WITH_CUDA OFF)
set(POP_CUDA_VERSION "")

if(NOT POP_CUDA MATCHES "^(AUTO|ON|OFF|SHIM)$")
  message(FATAL_ERROR "POP_CUDA: expected AUTO, ON, OFF or SHIM, got ${POP_CUDA}")
endif()

# For tests (tests/gpu/cuda_shim): the kernels as C++ on the CPU. In the package in <build>/python they replace the CPU backend;
# cuda_checks compares each with serial arithmetic, and cuda_races does the same under ThreadSanitizer.
function(pop_add_cuda_shim)
  set(shim tests/gpu/cuda_shim/cuda_shim.cpp tests/gpu/cuda_shim/device_shim.cpp)
  set_source_files_properties(${POP_CUDA_SOURCES} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
  add_library(pop_cuda STATIC ${POP_CUDA_SOURCES} ${shim})
  target_include_directories(pop_cuda PUBLIC tests/gpu/cuda_shim)
  target_compile_definitions(pop_cuda PUBLIC POP_WITH_CUDA POP_CUDA_SHIM POP_CUDA_SM90A)

  find_package(Threads REQUIRED)
  add_executable(cuda_checks ${POP_CUDA_CHECKS})
  target_link_libraries(cuda_checks PRIVATE pop_cuda pop_core Threads::Threads)
  add_executable(cuda_races ${POP_CUDA_CHECKS} ${POP_CUDA_SOURCES} ${shim})
  target_include_directories(cuda_races PRIVATE tests/gpu/cuda_shim)
  target_compile_definitions(cuda_races PRIVATE POP_WITH_CUDA POP_CUDA_SHIM POP_CUDA_SHIM_THREADS POP_CUDA_SM90A)
  target_compile_options(cuda_races PRIVATE -g1 -O1 -fsanitize=thread)
  target_link_options(cuda_races PRIVATE -fsanitize=thread)
  target_link_libraries(cuda_races PRIVATE pop_core Threads::Threads)
endfunction()

function(pop_add_cuda)
  set(sm90a OFF)
  if(POP_CUDA_ARCHITECTURES MATCHES "90a")
    set(sm90a ON)
  endif()
  find_package(CUDAToolkit REQUIRED)
  add_library(pop_cuda STATIC ${POP_CUDA_SOURCES} cuda/device.cu)
  # A spill or a stack frame in a kernel is an error.
  target_compile_options(pop_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings
    -Xptxas=--warn-on-spills,--warn-on-local-memory-usage>)
  target_link_libraries(pop_cuda PUBLIC CUDA::cudart_static)
  list(TRANSFORM POP_CUDA_ARCHITECTURES REPLACE "^([0-9]+a?)$" "\\1+PTX" OUTPUT_VARIABLE names)
  list(TRANSFORM names REPLACE "-real$" "")
  list(JOIN names ", " names)
  set_source_files_properties(cuda/device.cu PROPERTIES COMPILE_DEFINITIONS "POP_CUDA_ARCHITECTURES=\"${names}\"")
  target_compile_definitions(pop_cuda PUBLIC POP_WITH_CUDA $<$<STREQUAL:${sm90a},ON>:POP_CUDA_SM90A>)

  # The same checks on a GPU, for compute-sanitizer: cmake --build <build> --target cuda_checks
  find_package(Threads REQUIRED)
  add_executable(cuda_checks EXCLUDE_FROM_ALL ${POP_CUDA_CHECKS})
  target_link_libraries(cuda_checks PRIVATE pop_cuda pop_core Threads::Threads)
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
  set(nvcc_missing "no nvcc was found: put it on PATH or set CMAKE_CUDA_COMPILER")
  if(CMAKE_CUDA_COMPILER)
    # Known before the language is enabled, which fails at an architecture that nvcc does not know.
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE about)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" release "${about}")
    set(nvcc_version ${CMAKE_MATCH_1})
    if(nvcc_version VERSION_LESS 12.0)
      set(nvcc_missing "expected nvcc 12.0 or later (C++20), got ${nvcc_version}")
      set(CMAKE_CUDA_COMPILER "")
    elseif(nvcc_version VERSION_LESS 12.8 AND POP_CUDA STREQUAL "AUTO")
      list(FILTER POP_CUDA_ARCHITECTURES EXCLUDE REGEX "^1[0-9][0-9]")
      message(STATUS "CUDA kernels: none for Blackwell, which nvcc ${nvcc_version} does not know (12.8 does)")
    endif()
  endif()
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES ${POP_CUDA_ARCHITECTURES})
    enable_language(CUDA)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # older CMake does not know nvcc's option
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    endif()
    set(CMAKE_CUDA_STANDARD 20)
    pop_add_cuda()
    set(POP_WITH_CUDA ON)
    set(POP_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
    message(STATUS "CUDA kernels: built with nvcc ${POP_CUDA_VERSION} for ${POP_CUDA_ARCHITECTURES}")
  elseif(POP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "POP_CUDA=ON, and ${nvcc_missing}")
  else()
    message(STATUS "CUDA kernels: not built (${nvcc_missing}; POP_CUDA=ON makes that an error)")
  endif()
endif()
