# Decides whether this build has CUDA and says so, then finds what the GPU side links. Afterwards
#   ANNULUS_HAS_CUDA, ANNULUS_HAS_CUDNN               1 or 0
#   ANNULUS_CUDART, ANNULUS_CUBLAS, ANNULUS_CUDNN, ANNULUS_NCCL   targets to link, empty where left out
# Nothing links the driver (libcuda.so.1): the program also starts on machines without one.
set(ANNULUS_CUDA AUTO CACHE STRING
  "GPUs: ON, OFF, or AUTO: on where nvcc is found (CUDACXX, PATH, /usr/local/cuda/bin)")
set_property(CACHE ANNULUS_CUDA PROPERTY STRINGS AUTO ON OFF)
set(ANNULUS_CUDA_ARCHITECTURES 90a-real CACHE STRING
  "GPU architectures by their numbers, as CMAKE_CUDA_ARCHITECTURES: 80 or newer, Hopper as 90a")
set(ANNULUS_CUDNN_FRONTEND "" CACHE PATH
  "Folder that holds cudnn_frontend.h; empty: where launch/install_packages puts it")
set(ANNULUS_HAS_CUDA 0)
set(ANNULUS_HAS_CUDNN 0)
set(ANNULUS_CUDART)
set(ANNULUS_CUBLAS)
set(ANNULUS_CUDNN)
set(ANNULUS_NCCL)

if(NOT ANNULUS_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "ANNULUS_CUDA=${ANNULUS_CUDA}: expected AUTO, ON or OFF")
endif()
if(ANNULUS_CUDA STREQUAL OFF)
  message(STATUS "CUDA: off, as ANNULUS_CUDA=OFF says")
  return()
endif()
if(NOT "$ENV{CUDACXX}" STREQUAL "")
  find_program(CMAKE_CUDA_COMPILER NAMES $ENV{CUDACXX} NO_CACHE)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "CUDACXX=$ENV{CUDACXX}: no such program")
  endif()
endif()
find_program(CMAKE_CUDA_COMPILER NAMES nvcc PATHS /usr/local/cuda/bin NO_CACHE)
if(NOT CMAKE_CUDA_COMPILER)
  set(where "no nvcc in CUDACXX, on the PATH or in /usr/local/cuda/bin")
  if(NOT ANNULUS_CUDA STREQUAL AUTO)
    message(FATAL_ERROR "ANNULUS_CUDA=${ANNULUS_CUDA}: ${where}")
  endif()
  unset(CMAKE_CUDA_COMPILER)
  message(STATUS "CUDA: off, ${where}")
  return()
endif()

if(NOT ANNULUS_CUDA_ARCHITECTURES)
  message(FATAL_ERROR "ANNULUS_CUDA_ARCHITECTURES: expected architectures, such as 90a-real or 80-real;90a-real")
endif()
foreach(architecture ${ANNULUS_CUDA_ARCHITECTURES})
  if(NOT architecture MATCHES "^([0-9]+)(a?)(-real|-virtual)?$" OR CMAKE_MATCH_1 LESS 80)
    message(FATAL_ERROR "ANNULUS_CUDA_ARCHITECTURES=${ANNULUS_CUDA_ARCHITECTURES}: expected numbers of 80 or more, "
      "each alone or with -real or -virtual, found ${architecture}")
  elseif(CMAKE_MATCH_1 EQUAL 90 AND NOT CMAKE_MATCH_2 STREQUAL a)
    message(FATAL_ERROR "ANNULUS_CUDA_ARCHITECTURES=${ANNULUS_CUDA_ARCHITECTURES}: expected 90a${CMAKE_MATCH_3}, "
      "found ${architecture}: kernels for Hopper use instructions that only 90a has")
  endif()
endforeach()
set(CMAKE_CUDA_ARCHITECTURES ${ANNULUS_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_STANDARD_REQUIRED OFF)  # CMake 3.25 does not know the C++20 flag of newer nvcc: annulus_options gives it
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
if(ANNULUS_CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${ANNULUS_CCACHE})
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(ANNULUS_HAS_CUDA 1)
set(ANNULUS_CUDART CUDA::cudart_static)
set(ANNULUS_CUBLAS CUDA::cublasLt)
message(STATUS "CUDA: on, ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}, "
  "architectures ${ANNULUS_CUDA_ARCHITECTURES}")

# annulus_gpu_library(NAME HEADER): the target annulus_gpu_NAME, where header and library are found.
function(annulus_gpu_library name header)
  find_path(ANNULUS_${name}_INCLUDE ${header} HINTS ${CUDAToolkit_INCLUDE_DIRS})
  find_library(ANNULUS_${name}_LIBRARY ${name} HINTS ${CUDAToolkit_LIBRARY_DIR})
  mark_as_advanced(ANNULUS_${name}_INCLUDE ANNULUS_${name}_LIBRARY)
  if(ANNULUS_${name}_INCLUDE AND ANNULUS_${name}_LIBRARY)
    add_library(annulus_gpu_${name} UNKNOWN IMPORTED)
    set_target_properties(annulus_gpu_${name} PROPERTIES IMPORTED_LOCATION ${ANNULUS_${name}_LIBRARY}
      INTERFACE_INCLUDE_DIRECTORIES ${ANNULUS_${name}_INCLUDE})
  endif()
endfunction()

annulus_gpu_library(nccl nccl.h)
if(NOT TARGET annulus_gpu_nccl)
  message(FATAL_ERROR "CUDA is on, but nccl.h or libnccl is neither beside the CUDA toolkit nor in the system's "
    "folders: install NCCL (libnccl-dev), or name ANNULUS_nccl_INCLUDE and ANNULUS_nccl_LIBRARY, "
    "or leave the GPU side out with -DANNULUS_CUDA=OFF")
endif()
set(ANNULUS_NCCL annulus_gpu_nccl)

annulus_gpu_library(cudnn cudnn.h)
set(cudnn_frontend ${PROJECT_SOURCE_DIR}/.cache/cudnn-frontend/include)
if(ANNULUS_CUDNN_FRONTEND)
  set(cudnn_frontend ${ANNULUS_CUDNN_FRONTEND})
endif()
if(NOT EXISTS ${cudnn_frontend}/cudnn_frontend.h)
  if(ANNULUS_CUDNN_FRONTEND)
    message(FATAL_ERROR "ANNULUS_CUDNN_FRONTEND=${ANNULUS_CUDNN_FRONTEND}: no cudnn_frontend.h there")
  endif()
  message(STATUS "cuDNN: left out, no ${cudnn_frontend}/cudnn_frontend.h (launch/install_packages fetches it)")
elseif(NOT TARGET annulus_gpu_cudnn)
  message(STATUS "cuDNN: left out, no cudnn.h or libcudnn beside the CUDA toolkit or in the system's folders")
else()
  set(ANNULUS_HAS_CUDNN 1)
  # The frontend refers to NVRTC, though attention never calls it.
  set(ANNULUS_CUDNN annulus_gpu_cudnn CUDA::nvrtc)
  target_include_directories(annulus_gpu_cudnn INTERFACE ${cudnn_frontend})
  target_compile_definitions(annulus_gpu_cudnn INTERFACE CUDNN_FRONTEND_SKIP_JSON_LIB)
  message(STATUS "cuDNN: on, frontend in ${cudnn_frontend}")
endif()
