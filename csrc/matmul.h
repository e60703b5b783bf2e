struct bitgen_matmul {
    const uint8_t *w;        /* packed weights of the whole matrix, 64-byte aligned */
    const int8_t *x;         /* (n, x_stride) int8 activations, zero padded, rows 64-byte aligned */
    const int32_t *x_sum;    /* (n) sum of each row of x */
    const uint8_t *tables;   /* (n, table_stride) lookup tables, NULL when the kernel reads none */
    const float *x_scale;    /* (n) */
    const float *w_scale;    /* (m), or (1) with w_scale_stride 0 */
    int32_t *acc;            /* (n, out_stride) exact integers, or NULL */
    float *y;                /* (n, out_stride) (float)acc * (x_scale * w_scale), or NULL */
    void *scratch;           /* NAME_scratch(m, k, n) bytes for each thread, 64-byte aligned */
    int64_t x_stride, table_stride, w_scale_stride, out_stride;
    int64_t m, k, n;
    int64_t row_begin, row_end;  /* row_begin a multiple of the row block; row_end too, or m */
};
