# The tests that need a GPU, one at a time: they fill its memory and some take times.
set(gpu_test_properties LABELS gpu RUN_SERIAL ON)

add_library(annulus_gpu_test_support INTERFACE)
target_include_directories(annulus_gpu_test_support INTERFACE ${PROJECT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR})
target_link_libraries(annulus_gpu_test_support INTERFACE annulus_ops annulus_options ${ANNULUS_CUDART} ${ANNULUS_CUBLAS})
annulus_tests(gpu annulus_gpu_test_support ${gpu_test_properties})
add_dependencies(gpu_test annulus)  # which tests/gpu/train_test.cc starts

# annulus_kernel_check(PROGRAM ARGUMENT sources...): a program that compares kernels with f64 on the CPU and times
# them; the test runs the part that ARGUMENT names.
function(annulus_kernel_check program argument)
  add_executable(${program} ${ARGN})
  target_link_libraries(${program} PRIVATE annulus_gpu_test_support)
  add_test(NAME ${program} COMMAND ${program} ${argument})
  set_tests_properties(${program} PROPERTIES TIMEOUT 600 ${gpu_test_properties})
endfunction()

file(GLOB sources CONFIGURE_DEPENDS cuda/*.cc cuda/*.cu)
if(NOT ANNULUS_HAS_CUDNN)
  list(FILTER sources EXCLUDE REGEX "check_attention")
endif()
annulus_kernel_check(cuda_check ela ${sources})
target_link_libraries(cuda_check PRIVATE ${ANNULUS_CUDNN})

file(GLOB sources CONFIGURE_DEPENDS cuda/attention_mma/*.cu)
annulus_kernel_check(attention_mma_check check ${sources})

# The component `tests` of an installed tree: launch/test --gpu runs there what commands.txt lists.
annulus_install(tests ${gpu_programs} cuda_check attention_mma_check COMPONENT tests)
list(APPEND gpu_commands "tests/cuda_check ela" "tests/attention_mma_check check")
list(JOIN gpu_commands "\n" gpu_commands)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/commands.txt "${gpu_commands}\n")
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/commands.txt DESTINATION tests COMPONENT tests EXCLUDE_FROM_ALL)
install(PROGRAMS ${PROJECT_SOURCE_DIR}/launch/test ${PROJECT_SOURCE_DIR}/launch/mpirun DESTINATION launch
  COMPONENT tests EXCLUDE_FROM_ALL)
