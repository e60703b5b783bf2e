/* Arithmetic on sizes. Internal. */
#pragma once

#include <stdint.h>

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* a / b rounded up, and the multiple of b at or above a; a >= 0, b > 0. */
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t ceil_to(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
