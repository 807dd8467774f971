/* Keys or values of tokens in the memory, `[B, tokens, K, width]`: rows of the batch are `row` tokens apart. Bits are 32,
   16 (bfloat16), 8, or 4; scales and zeros are bfloat16. */
typedef struct {
    void *codes;
    uint16_t *scale, *zero;
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

INLINE int64_t common(int64_t width) { /* channels of a group in 4 bits: gcd(width, 32) */
    int64_t found = width & -width;
    return found < 32 ? found : 32;
}

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

/* Write one head of one token; `at` counts heads from the start of the tensor. */
static void encode(const Held *held, int64_t bits, int64_t at, const float *x, int64_t width, float *work) {
    if (bits == 32) {
        memcpy((float *)held->codes + at * width, x, (size_t)width * sizeof(float));
    } else if (bits == 16) {
        uint16_t *to = (uint16_t *)held->codes + at * width;
        for (int64_t d = 0; d < width; d++) to[d] = half_of(x[d]);
    } else if (bits == 8) {
        int8_t *to = (int8_t *)held->codes + at * width;
        float largest = 0;
        for (int64_t d = 0; d < width; d++) largest = fabsf(x[d]) > largest ? fabsf(x[d]) : largest;
        largest = largest * (float)(1.0 / 127);
        held->scale[at] = half_of(largest > 1e-30f ? largest : 1e-30f);
        float scale = wide_of(held->scale[at]);
        for (int64_t d = 0; d < width; d++) to[d] = (int8_t)rintf(x[d] / scale);
    } else {
        uint8_t *to = (uint8_t *)held->codes + at * (width / 2);
        int64_t size = common(width), groups = width / size;
        memcpy(work, x, (size_t)width * sizeof(float));
        turn(work, width);
        for (int64_t g = 0; g < groups; g++) {
            float *own = work + g * size, low = own[0], high = own[0];
            for (int64_t d = 1; d < size; d++) low = own[d] < low ? own[d] : low, high = own[d] > high ? own[d] : high;
            uint16_t zero = half_of(low);
            float base = wide_of(zero), step = (high - low) / 15, finest = fabsf(base) * 0.0078125f;
            step = step > finest ? step : finest;
            held->zero[at * groups + g] = zero;
            held->scale[at * groups + g] = half_of(step > 1e-30f ? step : 1e-30f);
            step = wide_of(held->scale[at * groups + g]);
            for (int64_t d = 0; d < size; d++) {
                float level = rintf((own[d] - base) / step);
                own[d] = level > 0 ? level < 15 ? level : 15 : 0;
            }
        }
        for (int64_t d = 0; d < width / 2; d++) to[d] = (uint8_t)((int)work[d] | (int)work[d + width / 2] << 4);
    }
}

/* Read `count` tokens of a head, each to `wide` numbers; in 4 bits they stay turned. */
static void decode(const Held *held, int64_t bits, int64_t row, int64_t head, int64_t heads, int64_t first,
                   int64_t count, int64_t width, int64_t wide, float *into) {
    int64_t size = common(width), groups = width / size, half = width / 2;
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
            const uint16_t *scale = held->scale + at * groups, *zero = held->zero + at * groups;
            if (size % LANES == 0 && half % size == 0) {
                for (int64_t g = 0, d = 0; d < half; g++) {
                    float low = wide_of(scale[g]), high = wide_of(scale[g + groups / 2]);
                    float from = wide_of(zero[g]), above = wide_of(zero[g + groups / 2]);
                    for (int64_t end = d + size; d < end; d += LANES) {
                        ints both = codes_of(x + d);
                        keep(into + d, low * __builtin_convertvector(both & 15, vec) + from);
                        keep(into + half + d, high * __builtin_convertvector(both >> 4, vec) + above);
                    }
                }
                continue;
            }
            for (int64_t d = 0; d < half; d++) {
                into[d] = wide_of(scale[d / size]) * (float)(x[d] & 15) + wide_of(zero[d / size]);
                into[half + d] = wide_of(scale[(half + d) / size]) * (float)(x[d] >> 4) + wide_of(zero[(half + d) / size]);
            }
        }
    }
}
