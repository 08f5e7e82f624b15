# An installed tree can be moved and copied to another machine: bin/annulus finds the small libraries in lib/.
# The machine itself has libc, libstdc++ and zlib, MPI, the CUDA toolkit's libraries, NCCL and cuDNN.
set(CMAKE_INSTALL_RPATH $ORIGIN/../lib /usr/local/cuda/lib64)
set(annulus_libraries_of_the_machine
  "^ld-linux" "^lib(c|m|dl|rt|pthread|gcc_s|stdc\\+\\+|z)\\.so"
  "^lib(mpi|open-rte|open-pal|ucp|ucs|uct|fabric)" "^lib(cuda|cudart|cublas|cublasLt|cudnn|nccl|nvrtc|nvJitLink)")

# annulus_install(FOLDER program... [COMPONENT name]): the programs and what they need go into the installed tree.
# With a component they go there only when it is asked for by name.
function(annulus_install folder)
  cmake_parse_arguments(ARG "" "COMPONENT" "" ${ARGN})
  set(component)
  set(set_name programs)
  if(ARG_COMPONENT)
    set(component COMPONENT ${ARG_COMPONENT} EXCLUDE_FROM_ALL)
    set(set_name ${ARG_COMPONENT})
  endif()
  # DT_RPATH, not DT_RUNPATH, which would not serve libraries that other libraries in lib/ need.
  foreach(program ${ARG_UNPARSED_ARGUMENTS})
    target_link_options(${program} PRIVATE -Wl,--disable-new-dtags)
  endforeach()
  install(TARGETS ${ARG_UNPARSED_ARGUMENTS} RUNTIME_DEPENDENCY_SET ${set_name}
    RUNTIME DESTINATION ${folder} ${component})
  install(RUNTIME_DEPENDENCY_SET ${set_name} PRE_EXCLUDE_REGEXES ${annulus_libraries_of_the_machine}
    LIBRARY DESTINATION lib ${component})
endfunction()
