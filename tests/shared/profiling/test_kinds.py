"""Names of kernels as they stand in traces of NVIDIA GPUs."""

import pytest

from shared.profiling.kinds import kind_of_kernel


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4>>(params)", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1", "attention"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 7, false>(…)", "attention"),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        ("sm90_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_kernel_cudnn", "convolutions"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16>(…)", "convolutions"),
        ("void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>(…)", "convolutions"),
        ("void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1>(…)", "convolutions"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false>(…)", "copies"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "matrix products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(…)", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn>", "matrix products"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>(…)", "normalisation"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(…)", "normalisation"),
        ("void at::native::elementwise_kernel<128, 4, at::native::GroupNormKernelImplInternal…>", "normalisation"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernel2<float>(…)", "normalisation"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel…>", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, sum_functor>>", "elementwise"),
        ("void at::native::(anonymous namespace)::upsample_nearest2d_nhwc_out_frame<float>(…)", "elementwise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda…>", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<…>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void kOptimizerStatic8bit2StateBlockwise<float, 1, 256, 1>(…)", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("triton_poi_fused_add_convolution_silu_12", "elementwise"),
        ("triton_red_fused_native_group_norm_silu_3", "normalisation"),
        ("triton_per_fused_native_layer_norm_4", "normalisation"),
        ("triton_poi_fused__to_copy_clone_1", "copies"),
        ("triton_poi_fused_cat_9", "copies"),
        ("triton_red_fused_convolution_backward_sum_21", "elementwise"),
        ("triton_tem_fused_addmm_7", "matrix products"),
        ("triton_tem_fused_convolution_2", "convolutions"),
        ("triton_per_fused__softmax_5", "attention"),
        ("triton_mm_persistent", "matrix products"),
        ("void somebody::elses<float>(…)", None),
    ],
)
def test_kernels(name: str, kind: str | None) -> None:
    assert kind_of_kernel(name) == kind
