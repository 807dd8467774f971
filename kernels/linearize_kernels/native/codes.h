/* Keys or values of tokens in the memory, `[B, tokens, K, width]`: rows of the batch are `row` tokens apart. Bits are 32,
   16 (bfloat16), 8, or 4; scales are bfloat16. */
typedef struct {
    void *codes;
    uint16_t *scale;
    int64_t row;
} Held;

INLINE float wide_of(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint16_t half_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Decode 4-bit numbers c, -8 to 7, in units of the scale. */
INLINE vec level_of(vec c) { return c * (c * c * (1 / 256.0f) + 0.75f); }

/* The Hadamard matrix / sqrt(size) times x, in blocks of the largest power of two that divides the width. */
static void turn(float *x, int64_t width) {
    int64_t size = width & -width;
    float root = 1 / sqrtf((float)size);
    for (int64_t half = 1; half < size; half *= 2)
        for (int64_t i = 0; i < width; i += 2 * half)
            for (int64_t j = i; j < i + half; j++) {
                float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
    for (int64_t i = 0; i < width; i++) x[i] *= root;
}

/* Write one head of one token; `at` counts heads from the start of the tensor. `work` has room for whole vectors. See
   `codes.py`. */
static void encode(const Held *held, int64_t bits, int64_t at, const float *x, int64_t width, float *work) {
    if (bits == 32) {
        memcpy((float *)held->codes + at * width, x, (size_t)width * sizeof(float));
        return;
    }
    if (bits == 16) {
        uint16_t *to = (uint16_t *)held->codes + at * width;
        for (int64_t d = 0; d < width; d++) to[d] = half_of(x[d]);
        return;
    }
    float low = INFINITY, high = -INFINITY, odd = 0; /* `odd` is NaN if a channel is not finite */
    memcpy(work, x, (size_t)width * sizeof(float));
    if (bits == 4) turn(work, width);
    for (int64_t d = 0; d < width; d++) low = work[d] < low ? work[d] : low, high = work[d] > high ? work[d] : high, odd += work[d] - work[d];
    float most = bits == 8 ? (float)(1.0 / 127) * (high > -low ? high : -low) : -0.125f * (high > -1.0003f * low ? high : low);
    held->scale[at] = half_of(odd != 0 ? odd : fabsf(most) < 1e-30f ? 1e-30f : most);
    float scale = wide_of(held->scale[at]);
    if (bits == 8) {
        int8_t *to = (int8_t *)held->codes + at * width;
        for (int64_t d = 0; d < width; d++) to[d] = (int8_t)rintf(work[d] / scale);
        return;
    }
    vec square = all(0), common = all(0);
    memset(work + width, 0, (size_t)(up(width, LANES) - width) * sizeof(float));
    for (int64_t d = 0; d < width; d += LANES) {
        vec x = load(work + d) / scale, xx = x * x, c = x * ((xx * (3 / 65536.0f) - 1 / 128.0f) * xx + 21 / 16.0f);
        c = (c + 12582912.0f) - 12582912.0f; /* to whole numbers */
        c = pick(c > -8.0f, pick(c < 7.0f, c, all(7)), all(-8)); /* NaN becomes -8 */
        square += xx, common += x * level_of(c);
        keep(work + d, c + 8.0f);
    }
    float total = sum_of(common);
    if (total > 0) held->scale[at] = half_of(scale * (sum_of(square) / total));
    uint8_t *to = (uint8_t *)held->codes + at * (width / 2);
    for (int64_t d = 0; d < width / 2; d++) to[d] = (uint8_t)((int)work[d] | (int)work[d + width / 2] << 4);
}

/* Read `count` tokens of a head, each to `wide` numbers; in 4 bits they stay turned. */
static void decode(const Held *held, int64_t bits, int64_t row, int64_t head, int64_t heads, int64_t first,
                   int64_t count, int64_t width, int64_t wide, float *into) {
    int64_t half = width / 2;
    for (int64_t t = 0; t < count; t++, into += wide) {
        int64_t at = (row * held->row + first + t) * heads + head;
        if (bits == 32) {
            memcpy(into, (const float *)held->codes + at * width, (size_t)width * sizeof(float));
        } else if (bits == 16) {
            const uint16_t *x = (const uint16_t *)held->codes + at * width;
            for (int64_t d = 0; d < width; d++) into[d] = wide_of(x[d]);
        } else if (bits == 8) {
            const int8_t *x = (const int8_t *)held->codes + at * width;
            float scale = wide_of(held->scale[at]);
            int64_t d = 0;
            for (; d + LANES <= width; d += LANES)
                keep(into + d, scale * __builtin_convertvector(signed_codes_of(x + d), vec));
            for (; d < width; d++) into[d] = scale * (float)x[d];
        } else {
            const uint8_t *x = (const uint8_t *)held->codes + at * half;
            float scale = wide_of(held->scale[at]);
            int64_t d = 0;
            for (; d + LANES <= half; d += LANES) {
                ints both = codes_of(x + d);
                keep(into + d, scale * level_of(__builtin_convertvector((both & 15) - 8, vec)));
                keep(into + half + d, scale * level_of(__builtin_convertvector((both >> 4) - 8, vec)));
            }
            for (; d < half; d++) {
                into[d] = scale * level_of(all((float)((x[d] & 15) - 8)))[0];
                into[half + d] = scale * level_of(all((float)((x[d] >> 4) - 8)))[0];
            }
        }
    }
}
