/* Vectors of the machine's width, in the vector extensions of gcc and clang. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* ROWS queries times 2 vectors of keys are sums in registers at a time. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 12 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 6 };
#else
enum { LANES = 4, ROWS = 6 };
#endif
enum { WIDE = 2 * LANES, PANEL = 32, BLOCK = 32 };

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int8_t signed_bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int16_t signed_halves __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *x) { return *(const vec *)x; }
INLINE void keep(float *x, vec v) { *(vec *)x = v; }
INLINE vec all(float x) { return (vec){0} + x; }
INLINE vec pick(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }
INLINE int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

#if defined(__AVX512F__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SUM
INLINE float sum_of(vec v) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    eight a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    four b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    b += __builtin_shufflevector(b, b, 2, 3, 0, 1);
    return b[0] + b[1];
}
#endif
#endif
#ifndef HAS_SUM
INLINE float sum_of(vec v) {
    float x[LANES], total;
    memcpy(x, &v, sizeof x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    total = x[0];
    return total;
}
#endif

/* gcc widens to twice the width in one instruction, and to four times the width number by number. */
INLINE ints codes_of(const uint8_t *x) {
    return __builtin_convertvector(__builtin_convertvector(*(const bytes *)x, halves), ints);
}
INLINE ints signed_codes_of(const int8_t *x) {
    return __builtin_convertvector(__builtin_convertvector(*(const signed_bytes *)x, signed_halves), ints);
}

INLINE float largest_of(vec v) {
    float found = v[0];
    for (int i = 1; i < LANES; i++) found = v[i] > found ? v[i] : found;
    return found;
}

/* e^x with an error of about one unit in the last place; 0 below -87. */
INLINE vec exponential(vec x) {
    const float magic = 12582912.0f; /* adding it rounds to whole numbers */
    ints none = x < -87.0f;
    x = pick(none, all(-87.0f), x);
    vec n = (x * 1.44269504088896341f + magic) - magic;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ints power = __builtin_convertvector(n, ints) << 23;
    return (vec)((ints)((vec)((ints)p + power)) & ~none);
}

INLINE vec hyperbolic_tangent(vec x) {
    vec size = (vec)((ints)x & 0x7fffffff), square = x * x;
    vec p = square * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    vec near = p * square * x + x;
    vec t = exponential(size * -2.0f);
    vec far = (1.0f - t) / (1.0f + t);
    far = (vec)((ints)far | ((ints)x & (int32_t)0x80000000));
    return pick(size < 0.625f, near, far);
}

INLINE void cap(float *x, int64_t count, float softcap) {
    for (int64_t i = 0; i < count; i += LANES) keep(x + i, softcap * hyperbolic_tangent(load(x + i) / softcap));
}

INLINE float *aligned(size_t count) {
    float *made = aligned_alloc(64, up((int64_t)(count * sizeof(float)), 64) + 64);
    if (made) memset(made, 0, count * sizeof(float));
    return made;
}
