/* Attention with landmarks over the tokens of a call, for one row and key/value head after the other.

   A block's queries are taken ROWS at a time: their scores with sinks, window and slots, one softmax, the attention that
   tokens receive, and the sums of values. Keys lie in panels of PANEL tokens, channel by channel, so that a vector holds
   the same channel of neighbours; the window is a run of the text's panels. All tensors are contiguous float32, numbers
   int32, indices int64. */

#include "vectors.h"
#include "ranks.h"

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

int64_t prompt_bytes(void) { return (int64_t)sizeof(Prompt); }

/* The tensors of one row and head, packed. Queries read three of them: sinks, window and slots. */
typedef struct {
    const Prompt *of;
    int64_t row, head, merged, filled, block, wide;
    float *text_k, *text_v, *sink_k, *sink_v, *slot_k, *slot_v;
    float *score, *attention, *queries, *text_received, *shares, *own, *sums, *work;
    int32_t *number, *origin;
    uint8_t *exists;
} Pair;

typedef struct {
    const float *k, *v;
    int64_t panel, most, visible[ROWS];
} Seen;

INLINE void place_key(float *panels, int64_t at, const float *key, int64_t width) {
    float *to = panels + at / PANEL * PANEL * width + at % PANEL;
    for (int64_t d = 0; d < width; d++) to[d * PANEL] = key[d];
}

static void pack(float *panels, float *values, int64_t wide, const Prompt *p, const float *k, const float *v,
                 int64_t row, int64_t head, int64_t tokens, int64_t count) {
    for (int64_t t = 0; t < count; t++) {
        int64_t at = (row * tokens + t) * p->heads + head;
        place_key(panels, t, k + at * p->width, p->width);
        if (p->y) memcpy(values + t * wide, v + at * p->values, (size_t)p->values * sizeof(float));
    }
}

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

/* Queries `at` to `at + rows` of a block, counted by token and then by head of the group; `start` is the block's first. */
INLINE void attend(const int rows, Pair *w, int64_t start, int64_t at) {
    const Prompt *p = w->of;
    int64_t groups = p->groups, width = p->width, border = w->block * BLOCK, panels = 0, place[ROWS], head[ROWS];
    Seen seen[3] = {{w->sink_k, w->sink_v, 0, 0, {0}},
                    {w->text_k + border * width, w->text_v ? w->text_v + border * w->wide : NULL, 0, 0, {0}},
                    {w->slot_k, w->slot_v, 0, 0, {0}}};
    for (int i = 0; i < rows; i++) {
        int64_t t = place[i] = start + (at + i) / groups;
        head[i] = w->head * groups + (at + i) % groups;
        const float *q = p->q + ((w->row * p->queries + t - p->first) * p->heads * groups + head[i]) * width;
        for (int64_t d = 0; d < width; d++) w->own[d * rows + i] = q[d] * (float)p->scale;
        seen[0].visible[i] = least(p->sinks, t + p->sinks + 1);
        seen[1].visible[i] = most(t - border + 1, 0);
        seen[2].visible[i] = w->filled;
        for (int part = 0; part < 3; part++) seen[part].most = most(seen[part].most, seen[part].visible[i]);
    }
    for (int part = 0; part < 3; part++) {
        seen[part].panel = panels;
        for (int64_t j = 0; j < seen[part].most; j += PANEL)
            products(rows, w->own, seen[part].k + j * width, width, w->shares + panels++ * rows * PANEL);
    }
    if (p->softcap > 0) cap(w->shares, panels * rows * PANEL, (float)p->softcap);
    float inverse[ROWS], log_of[ROWS];
    for (int i = 0; i < rows; i++) {
        vec top = all(-INFINITY), total = all(0);
        for (int part = 0; part < 3; part++)
            for (int64_t j = 0; j < seen[part].most; j += PANEL) {
                float *s = w->shares + ((seen[part].panel + j / PANEL) * rows + i) * PANEL;
                for (int64_t c = most(seen[part].visible[i] - j, 0); c < PANEL; c++) s[c] = -INFINITY;
                for (int c = 0; c < PANEL; c += LANES) {
                    vec x = load(s + c);
                    top = pick(x > top, x, top);
                }
            }
        float largest = largest_of(top);
        for (int64_t j = 0; j < panels; j++) {
            float *s = w->shares + (j * rows + i) * PANEL;
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
        const float *s = w->shares + (seen[2].panel + j / PANEL) * rows * PANEL;
        for (int c = 0; c < PANEL; c += LANES) {
            vec total = all(0);
            for (int i = 0; i < rows; i++) total += inverse[i] * load(s + i * PANEL + c);
            keep(w->attention + j + c, load(w->attention + j + c) + total);
        }
    }
    for (int i = 0; i < rows; i++) {
        int64_t distant = place[i] - border - p->window / 4 + 1; /* the number of tokens that are far enough away */
        for (int64_t j = 0; j < distant; j++)
            w->text_received[border + j] +=
                inverse[i] * w->shares[((seen[1].panel + j / PANEL) * rows + i) * PANEL + j % PANEL];
    }
    if (!p->y) return;
    value_sums(rows, seen, w->shares, w->wide, w->sums);
    for (int i = 0; i < rows; i++) {
        int64_t to = (w->row * p->queries + place[i] - p->first) * p->heads * groups + head[i];
        for (int64_t c = 0; c < p->values; c++) p->y[to * p->values + c] = w->sums[i * w->wide + c] * inverse[i];
        if (p->logs) p->logs[to] = log_of[i];
    }
}

static void merge(Pair *w, int64_t block) {
    const Prompt *p = w->of;
    int64_t slots = p->slots, border = block * BLOCK;
    Ranking how = {(float)p->weight, (float)p->fading, (float)p->least_attention, (float)p->least_spread,
                   (float)p->most_against};
    Merge found;
    for (int64_t t = 0; t < BLOCK; t++) {
        w->score[slots + t] = p->leaving_score[(w->row * p->heads + w->head) * p->leaves + border + t];
        w->attention[slots + t] = w->text_received[border + t];
        w->queries[slots + t] = (float)(p->window - p->window / 4 + BLOCK / 2);
        w->number[slots + t] = (int32_t)(p->sinks + 1 + w->merged * BLOCK + border + t);
        w->origin[slots + t] = (int32_t)(slots + border + t);
    }
    choose(&how, w->score, w->attention, w->queries, slots, w->filled, w->work, w->exists, &found);
    if (p->lost) {
        int32_t order[BLOCK];
        for (int i = 0; i < BLOCK; i++) {
            int at = i;
            for (; at > 0 && w->number[order[at - 1]] > w->number[found.lost[i]]; at--) order[at] = order[at - 1];
            order[at] = found.lost[i];
        }
        int64_t *to = p->lost + ((w->row * p->merges + block) * BLOCK) * p->heads + w->head;
        for (int i = 0; i < BLOCK; i++) to[i * p->heads] = w->number[order[i]] ? w->origin[order[i]] : -1;
    }
    for (int i = 0; i < found.count; i++) {
        int64_t slot = found.lost[i], token = slots + found.kept[i];
        int64_t at = (w->row * p->leaves + border + found.kept[i]) * p->heads + w->head;
        w->score[slot] = w->score[token];
        w->attention[slot] = w->attention[token];
        w->queries[slot] = w->queries[token];
        w->number[slot] = w->number[token];
        w->origin[slot] = w->origin[token];
        place_key(w->slot_k, slot, p->leaving_k + at * p->width, p->width);
        if (p->y)
            memcpy(w->slot_v + slot * w->wide, p->leaving_v + at * p->values, (size_t)p->values * sizeof(float));
    }
    w->filled = least(w->filled + BLOCK, slots);
    for (int64_t i = 0; i < slots; i++) {
        w->attention[i] *= (float)p->fading;
        w->queries[i] = w->queries[i] * (float)p->fading + BLOCK;
    }
    if (p->kept) {
        int32_t *to = p->kept + ((w->row * p->merges + block) * p->heads + w->head) * slots;
        memcpy(to, w->number, (size_t)slots * sizeof(int32_t));
    }
}

static void run(Pair *w) {
    const Prompt *p = w->of;
    int64_t slots = p->slots, row = w->row, head = w->head, total = p->total[row], stop = p->first + p->queries;
    w->merged = p->merged[row];
    w->filled = least(w->merged * BLOCK, slots);
    pack(w->text_k, w->text_v, w->wide, p, p->k, p->v, row, head, p->places, least(p->places, total));
    pack(w->sink_k, w->sink_v, w->wide, p, p->sink_k, p->sink_v, row, head, p->sinks, p->sinks);
    pack(w->slot_k, w->slot_v, w->wide, p, p->slot_k, p->slot_v, row, head, slots, w->filled);
    for (int64_t i = 0; i < slots; i++) {
        int64_t at = (row * slots + i) * p->heads + head;
        w->score[i] = p->slot_score[at];
        w->attention[i] = p->slot_received[at];
        w->number[i] = p->slot_number[at];
        w->origin[i] = (int32_t)i;
        w->queries[i] = expected_queries((p->sinks + BLOCK * (w->merged + 1) - w->number[i]) / BLOCK, p->window,
                                         (float)p->fading);
    }
    for (int64_t t = 0; t < p->places; t++)
        w->text_received[t] = p->held_received[(row * p->places + t) * p->heads + head];
    int64_t start = most(p->first, p->offset[row]), last = least(stop, total);
    for (w->block = 0; w->block <= p->merges; w->block++) {
        if (w->block) {
            if (total <= p->window - 1 + w->block * BLOCK) break;
            merge(w, w->block - 1);
        }
        int64_t end = least(p->window - 1 + (w->block + 1) * BLOCK, last), at = 0;
        if (!p->y && w->block == p->merges) break;
        int64_t count = (end - start) * p->groups;
        while (at < count) {
            if (count - at >= ROWS) attend(ROWS, w, start, at), at += ROWS;
            else if (count - at >= 4) attend(4, w, start, at), at += 4;
            else attend(1, w, start, at), at += 1;
        }
        start = most(start, end);
    }
    for (int64_t i = 0; i < slots; i++) {
        int64_t at = (row * slots + i) * p->heads + head;
        p->new_score[at] = w->score[i];
        p->new_received[at] = w->attention[i];
        p->new_number[at] = w->number[i];
        p->origin[at] = w->origin[i];
    }
    for (int64_t t = 0; t < p->places; t++)
        p->received[(row * p->places + t) * p->heads + head] = w->text_received[t];
}

/* The pairs of row and head from `from` to `to`. Returns 0, or 1 if there is no memory. */
int prompt(const Prompt *p, int64_t from, int64_t to) {
    int64_t wide = p->y ? up(p->values, WIDE) : 0, width = p->width, slots = up(p->slots + BLOCK, PANEL);
    int64_t text = up(p->places, PANEL), sinks = up(p->sinks, PANEL), window = up(p->window + BLOCK, PANEL);
    int64_t sizes[] = {text * width, text * wide, sinks * width, sinks * wide, slots * width, slots * wide,
                       slots, slots, slots, text, (sinks + window + slots) * ROWS, width * ROWS, wide * ROWS, 2 * slots,
                       slots, slots, slots};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    float *made[COUNT];
    int failed = 0;
    for (int i = 0; i < COUNT; i++) failed |= !(made[i] = aligned((size_t)(sizes[i] + PANEL)));
    for (int64_t pair = from; pair < to && !failed; pair++) {
        Pair w = {p, pair / p->heads, pair % p->heads, 0, 0, 0, wide,
                  made[0], p->y ? made[1] : NULL, made[2], made[3], made[4], made[5],
                  made[6], made[7], made[8], made[9], made[10], made[11], made[12], made[13],
                  (int32_t *)made[14], (int32_t *)made[15], (uint8_t *)made[16]};
        run(&w);
    }
    for (int i = 0; i < COUNT; i++) free(made[i]);
    return failed;
}
