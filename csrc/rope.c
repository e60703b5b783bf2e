/* Tables of cosines and sines for rotary embedding. */
#include "table.h"

static const int64_t DIMENSION_MAX = 1 << 24; /* of positions and of half a head */

/* Sine and cosine of a >= 0: a = n pi/2 + r with pi/2 in three parts of 33 bits, then the polynomials of fdlibm. Plain
 * double operations in one order: the same bits on every machine, whatever its libm. */
static void sine_cosine(double a, double *sine, double *cosine)
{
    const int64_t n = (int64_t)(a * 6.36619772367581382433e-01 + 0.5);
    const double f = (double)n;
    const double r =
        ((a - f * 1.57079632673412561417e+00) - f * 6.07710050630396597660e-11) - f * 2.02226624879595063154e-21;
    const double z = r * r;
    const double s = r + r * z *
                             (-1.66666666666666324348e-01 +
                              z * (8.33333333332248946124e-03 +
                                   z * (-1.98412698298579493134e-04 +
                                        z * (2.75573137070700676789e-06 +
                                             z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
    const double c = 1.0 - 0.5 * z +
                     z * z *
                         (4.16666666666666019037e-02 +
                          z * (-1.38888888888741095749e-03 +
                               z * (2.48015872894767294178e-05 +
                                    z * (-2.75573143513906633035e-07 +
                                         z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
    *sine = n & 1 ? c : s;
    *cosine = n & 1 ? s : c;
    if (n & 2) *sine = -*sine;
    if ((n + 1) & 2) *cosine = -*cosine;
}

int32_t bitgen_rope(const float *inverse_frequency, int64_t half, int64_t begin, int64_t end, float *table)
{
    if (!inverse_frequency || !table) return BITGEN_ERROR_NULL;
    if (half < 1 || half > DIMENSION_MAX || begin < 0 || end < begin || end > DIMENSION_MAX) return BITGEN_ERROR_SHAPE;
    for (int64_t p = begin; p < end; ++p)
        for (int64_t i = 0; i < half; ++i) {
            double sine, cosine;
            const float angle = (float)p * inverse_frequency[i];
            if (!(angle >= 0 && angle < 1e9f)) return BITGEN_ERROR_ARGUMENT;
            sine_cosine((double)angle, &sine, &cosine);
            table[p * 2 * half + i] = (float)cosine;
            table[p * 2 * half + half + i] = (float)sine;
        }
    return BITGEN_OK;
}
