/* Attention of some queries of a block, for `prompt.c`. */

/* The letters are those of `landmarks/exact.py`: R rows, L queries, P places, N slots, K heads. */
typedef struct {
    int64_t rows, heads, groups, width, values, queries, places, slots, sinks, window, leaves, first, merges;
    const float *q, *k, *v, *sink_k, *sink_v, *slot_k, *slot_v, *leaving_k, *leaving_v, *leaving_score, *held_received;
    const float *slot_score, *slot_received;
    const int32_t *slot_number;
    const int64_t *merged, *offset, *total;
    float *y, *logs, *received, *new_score, *new_received;
    int32_t *new_number;
    int64_t *origin;
    int32_t *kept;
    int64_t *lost;
    double scale, softcap, weight, fading, least_attention, least_spread, most_against;
} Prompt;

/* The tensors of one row and head, packed. Queries read three of them: sinks, window and slots. */
typedef struct {
    const Prompt *of;
    int64_t row, head, merged, filled, wide;
    int64_t block, start, end; /* the queries at hand */
    float *text_k, *text_v, *sink_k, *sink_v, *slot_k, *slot_v;
    float *score, *attention, *queries, *text_received, *told, *work;
    int32_t *number, *origin;
    uint8_t *exists;
} Pair;

typedef struct {
    float *shares, *own, *sums;
} Scratch;

typedef struct {
    const float *k, *v;
    int64_t panel, most, visible[ROWS];
} Seen;

INLINE void products(const int rows, const float *own, const float *k, int64_t width, float *into) {
    for (int c = 0; c < PANEL; c += WIDE) {
        vec a[ROWS][2];
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) a[i][0] = a[i][1] = all(0);
        for (int64_t d = 0; d < width; d++) {
            vec x = load(k + d * PANEL + c), y = load(k + d * PANEL + c + LANES);
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++) {
                float q = own[d * rows + i];
                a[i][0] += q * x;
                a[i][1] += q * y;
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            keep(into + i * PANEL + c, a[i][0]);
            keep(into + i * PANEL + c + LANES, a[i][1]);
        }
    }
}

INLINE void value_sums(const int rows, const Seen *seen, const float *shares, int64_t wide, float *sums) {
    for (int64_t c = 0; c < wide; c += WIDE) {
        vec a[ROWS][2];
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) a[i][0] = a[i][1] = all(0);
        for (int part = 0; part < 3; part++) {
            const float *v = seen[part].v + c, *p = shares + seen[part].panel * rows * PANEL;
            for (int64_t at = 0; at < seen[part].most; at += PANEL, p += rows * PANEL) {
                int64_t count = least(PANEL, seen[part].most - at);
                for (int64_t j = 0; j < count; j++, v += wide) {
                    vec x = load(v), y = load(v + LANES);
#pragma GCC unroll 16
                    for (int i = 0; i < rows; i++) {
                        float share = p[i * PANEL + j];
                        a[i][0] += share * x;
                        a[i][1] += share * y;
                    }
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            keep(sums + i * wide + c, a[i][0]);
            keep(sums + i * wide + c + LANES, a[i][1]);
        }
    }
}

/* The queries from `at` on, counted by token and then by head of the group. Adds what slots and text receive to `told`. */
INLINE void attend(const int rows, const Pair *w, Scratch *own, int64_t at, float *told_slots, float *told_text) {
    const Prompt *p = w->of;
    int64_t groups = p->groups, width = p->width, border = w->block * BLOCK, panels = 0, place[ROWS], head[ROWS];
    Seen seen[3] = {{w->sink_k, w->sink_v, 0, 0, {0}},
                    {w->text_k + border * width, w->text_v ? w->text_v + border * w->wide : NULL, 0, 0, {0}},
                    {w->slot_k, w->slot_v, 0, 0, {0}}};
    for (int i = 0; i < rows; i++) {
        int64_t t = place[i] = w->start + (at + i) / groups;
        head[i] = w->head * groups + (at + i) % groups;
        const float *q = p->q + ((w->row * p->queries + t - p->first) * p->heads * groups + head[i]) * width;
        for (int64_t d = 0; d < width; d++) own->own[d * rows + i] = q[d] * (float)p->scale;
        seen[0].visible[i] = least(p->sinks, t + p->sinks + 1);
        seen[1].visible[i] = most(t - border + 1, 0);
        seen[2].visible[i] = w->filled;
        for (int part = 0; part < 3; part++) seen[part].most = most(seen[part].most, seen[part].visible[i]);
    }
    for (int part = 0; part < 3; part++) {
        seen[part].panel = panels;
        for (int64_t j = 0; j < seen[part].most; j += PANEL)
            products(rows, own->own, seen[part].k + j * width, width, own->shares + panels++ * rows * PANEL);
    }
    if (p->softcap > 0) cap(own->shares, panels * rows * PANEL, (float)p->softcap);
    float inverse[ROWS], log_of[ROWS];
    for (int i = 0; i < rows; i++) {
        vec top = all(-INFINITY), total = all(0);
        for (int part = 0; part < 3; part++)
            for (int64_t j = 0; j < seen[part].most; j += PANEL) {
                float *s = own->shares + ((seen[part].panel + j / PANEL) * rows + i) * PANEL;
                for (int64_t c = most(seen[part].visible[i] - j, 0); c < PANEL; c++) s[c] = -INFINITY;
                for (int c = 0; c < PANEL; c += LANES) {
                    vec x = load(s + c);
                    top = pick(x > top, x, top);
                }
            }
        float largest = largest_of(top);
        for (int64_t j = 0; j < panels; j++) {
            float *s = own->shares + (j * rows + i) * PANEL;
            for (int c = 0; c < PANEL; c += LANES) {
                vec x = exponential(load(s + c) - largest);
                keep(s + c, x);
                total += x;
            }
        }
        float sum = sum_of(total);
        inverse[i] = 1 / sum;
        log_of[i] = largest + logf(sum);
    }
    for (int64_t j = 0; j < seen[2].most; j += PANEL) {
        const float *s = own->shares + (seen[2].panel + j / PANEL) * rows * PANEL;
        for (int c = 0; c < PANEL; c += LANES) {
            vec total = all(0);
            for (int i = 0; i < rows; i++) total += inverse[i] * load(s + i * PANEL + c);
            keep(told_slots + j + c, load(told_slots + j + c) + total);
        }
    }
    for (int i = 0; i < rows; i++) {
        int64_t distant = place[i] - border - p->window / 4 + 1; /* the number of tokens that are far enough away */
        for (int64_t j = 0; j < distant; j++)
            told_text[j] += inverse[i] * own->shares[((seen[1].panel + j / PANEL) * rows + i) * PANEL + j % PANEL];
    }
    if (!p->y) return;
    value_sums(rows, seen, own->shares, w->wide, own->sums);
    for (int i = 0; i < rows; i++) {
        int64_t to = (w->row * p->queries + place[i] - p->first) * p->heads * groups + head[i];
        for (int64_t c = 0; c < p->values; c++) p->y[to * p->values + c] = own->sums[i * w->wide + c] * inverse[i];
        if (p->logs) p->logs[to] = log_of[i];
    }
}
