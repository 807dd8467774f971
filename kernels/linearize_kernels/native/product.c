/* One row times a weight, read from memory once and in order: y = W x. */

#include "threads.h"
#include "vectors.h"

typedef struct {
    int64_t inputs, outputs;
    const float *x, *weight, *bias;
    float *y;
} Product;

int64_t product_bytes(void) { return (int64_t)sizeof(Product); }

enum { AHEAD = 2048 }; /* numbers that are asked for before they are read */

enum { OUTPUTS = 64 }; /* of a task */

static void outputs_of(void *given, int64_t at, int64_t thread) {
    const Product *p = given;
    int64_t inputs = p->inputs, last = least((at + 1) * OUTPUTS, p->outputs);
    (void)thread;
    for (int64_t o = at * OUTPUTS; o < last; o++) {
        const float *w = p->weight + o * inputs;
        vec a = all(0), b = all(0), c = all(0), d = all(0);
        int64_t i = 0;
        for (; i + 4 * LANES <= inputs; i += 4 * LANES) {
            for (int line = 0; line < 4 * LANES; line += 16) __builtin_prefetch(w + i + AHEAD + line);
            a += load(w + i) * load(p->x + i);
            b += load(w + i + LANES) * load(p->x + i + LANES);
            c += load(w + i + 2 * LANES) * load(p->x + i + 2 * LANES);
            d += load(w + i + 3 * LANES) * load(p->x + i + 3 * LANES);
        }
        float total = sum_of((a + b) + (c + d));
        for (; i < inputs; i++) total += w[i] * p->x[i];
        p->y[o] = p->bias ? total + p->bias[o] : total;
    }
}

int product(const Product *p, int64_t threads) {
    share(outputs_of, (void *)p, up(p->outputs, OUTPUTS) / OUTPUTS, threads);
    return 0;
}
