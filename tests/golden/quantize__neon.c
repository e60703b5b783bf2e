/* s = 127 / max(absmax, 1e-5); xq = round_half_even(x s), which needs no clamp (|x s| < 127.5); x_scale = 1 / s.
   x (k) float32 is read to its last element and no further; xq (k_pad) is written whole, zeros behind k. */
int32_t bitgen_quantize__neon(const float *x, int64_t k, int64_t k_pad, int8_t *xq, float *x_scale, int32_t *x_sum) {
    vw largest = vw_zero();
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) largest = vw_max(largest, vw_abs_bits(vf_load(x + i)));
    if (i < k) largest = vw_max(largest, vw_abs_bits(vf_load_n(x + i, (int)(k - i))));
    const int32_t bits = vw_hmax(largest); /* magnitudes are ordered as their bits are */
    if (bits >= 0x7f800000) return 1;      /* infinity or NaN */
    float absmax;
    memcpy(&absmax, &bits, 4);
    const float s = 127.0f / (absmax > 1e-5f ? absmax : 1e-5f);
    const vf scale = vf_splat(s);
    vw sum = vw_zero();
    for (i = 0; i + 16 <= k; i += 16) {
        const vw q = vw_round(vf_mul(vf_load(x + i), scale));
        sum = vw_add(sum, q);
        vw_store_s8(xq + i, q);
    }
    if (i < k) {
        const vw q = vw_round(vf_mul(vf_load_n(x + i, (int)(k - i)), scale));
        sum = vw_add(sum, q);
        vw_store_s8(xq + i, q);
        i += 16;
    }
    for (; i < k_pad; i += 16) vw_store_s8(xq + i, vw_zero());
    *x_scale = 1.0f / s;
    *x_sum = vw_hsum(sum);
    return 0;
}
