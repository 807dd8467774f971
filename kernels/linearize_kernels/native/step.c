/* One token of decoding with landmarks, on the tensors of the memory: for each row the merge that is due, the new token's
   codes, score and place, attention of its queries to sinks, window and slots with one softmax, and the attention that
   these receive. Rows may have seen different numbers of tokens. `landmarks/step.py` says the same in plain torch. */

#include "threads.h"
#include "vectors.h"
#include "ranks.h"
#include "codes.h"

typedef struct {
    int64_t rows, heads, groups, width, values, sinks, window, room, slots, near_bits, slot_bits, reads_only, learned;
    Held sink_k, sink_v, window_k, window_v, slot_k, slot_v;
    float *window_score, *window_received, *slot_score, *slot_received;
    int32_t *slot_number;
    int64_t window_row, slot_row; /* tokens between rows of the batch in these */
    const float *score_weight, *key_scale, *key_shift;
    double scale, softcap, weight, fading, least_attention, least_spread, most_against;
    const int64_t *counts, *real;
    const float *q, *k, *v, *key, *score;
    float *y, *logs;
} Step;

int64_t step_bytes(void) { return (int64_t)sizeof(Step); }

enum { TILE = 32, REACH = 2 };

/* Scores of some queries `[n, wide]` with tokens `[count, wide]`; those of a query are `stride` apart. */
INLINE void some_scores(const int n, const float *q, const float *k, int64_t count, int64_t wide, float *into, int64_t stride) {
    for (int64_t t = 0; t < count; t++) {
        vec total[4];
#pragma GCC unroll 4
        for (int g = 0; g < n; g++) total[g] = all(0);
        for (int64_t d = 0; d < wide; d += LANES) {
            vec x = load(k + t * wide + d);
#pragma GCC unroll 4
            for (int g = 0; g < n; g++) total[g] += load(q + g * wide + d) * x;
        }
#pragma GCC unroll 4
        for (int g = 0; g < n; g++) into[g * stride + t] = sum_of(total[g]);
    }
}

/* Add values `[count, wide]` to some sums `[n, wide]` by their shares. */
INLINE void some_sums(const int n, const float *shares, int64_t stride, const float *v, int64_t count, int64_t wide, float *sums) {
    for (int64_t c = 0; c < wide; c += WIDE) {
        vec a[4], b[4];
#pragma GCC unroll 4
        for (int g = 0; g < n; g++) a[g] = load(sums + g * wide + c), b[g] = load(sums + g * wide + c + LANES);
        for (int64_t t = 0; t < count; t++) {
            vec x = load(v + t * wide + c), y = load(v + t * wide + c + LANES);
#pragma GCC unroll 4
            for (int g = 0; g < n; g++) {
                a[g] += shares[g * stride + t] * x;
                b[g] += shares[g * stride + t] * y;
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < n; g++) keep(sums + g * wide + c, a[g]), keep(sums + g * wide + c + LANES, b[g]);
    }
}

#define BY_FOUR(call)                               \
    for (int64_t g = 0; g < groups; g += 4) switch (least(groups - g, 4)) { \
        case 1: call(1); break;                     \
        case 2: call(2); break;                     \
        case 3: call(3); break;                     \
        default: call(4);                           \
    }
#define SCORES(n) some_scores(n, q + g * wide, k, count, wide, into + g * stride, stride)
#define SUMS(n) some_sums(n, shares + g * stride, stride, v, count, wide, sums + g * wide)

static void scores_of(const float *q, int64_t groups, const float *k, int64_t count, int64_t wide, float *into, int64_t stride) {
    BY_FOUR(SCORES)
}

static void add_values(const float *shares, int64_t stride, int64_t groups, const float *v, int64_t count, int64_t wide, float *sums) {
    BY_FOUR(SUMS)
}

INLINE int64_t merged_of(const Step *s, int64_t tokens) { return most(tokens - s->window - s->sinks, 0) / BLOCK; }

static void shift(void *x, int64_t of_a_token, int64_t tokens) {
    memmove(x, (char *)x + BLOCK * of_a_token, (size_t)((tokens - BLOCK) * of_a_token));
    memset((char *)x + (tokens - BLOCK) * of_a_token, 0, (size_t)(BLOCK * of_a_token));
}

static void shift_held(const Held *held, int64_t bits, int64_t row, int64_t heads, int64_t width, int64_t tokens) {
    int64_t bytes = heads * width * bits / 8;
    shift((char *)held->codes + row * held->row * bytes, bytes, tokens);
    if (held->scale) shift(held->scale + row * held->row * heads, heads * 2, tokens);
}

/* Merge the window's oldest block into the slots of a row, and move the window on. */
static void merge_row(const Step *s, int64_t row, int64_t merged, float *work, float *tile) {
    int64_t heads = s->heads, slots = s->slots, end = slots + BLOCK, wide = up(most(s->width, s->values), WIDE);
    Ranking how = {(float)s->weight, (float)s->fading, (float)s->least_attention, (float)s->least_spread,
                   (float)s->most_against};
    float *score = work, *received = work + end, *queries = work + 2 * end;
    for (int64_t head = 0; head < heads; head++) {
        int64_t first = row * s->slot_row * heads + head, near = row * s->window_row * heads + head;
        for (int64_t i = 0; i < slots; i++) {
            score[i] = s->slot_score[first + i * heads];
            received[i] = s->slot_received[first + i * heads];
            int64_t age = (s->sinks + BLOCK * (merged + 1) - s->slot_number[first + i * heads]) / BLOCK;
            queries[i] = expected_queries(age, s->window, (float)s->fading);
        }
        for (int64_t t = 0; t < BLOCK; t++) {
            received[slots + t] = s->window_received[near + t * heads];
            queries[slots + t] = (float)(s->window - s->window / 4 + BLOCK / 2);
            int64_t from = s->learned ? t : most(t - REACH, 0), to = s->learned ? t + 1 : t + REACH + 1;
            to = least(to, s->learned ? BLOCK : BLOCK + least(REACH, s->window - 1));
            float total = 0;
            for (int64_t i = from; i < to; i++) total += s->window_score[near + i * heads];
            score[slots + t] = total / (float)(to - from);
        }
        Merge found;
        choose(&how, score, received, queries, slots, least(merged * BLOCK, slots), work + 3 * end,
               (uint8_t *)(work + 5 * end), &found);
        for (int i = 0; i < found.count; i++) {
            int64_t to = first + found.lost[i] * heads, token = found.kept[i];
            s->slot_score[to] = score[slots + token];
            s->slot_received[to] = received[slots + token];
            s->slot_number[to] = (int32_t)(s->sinks + 1 + merged * BLOCK + token);
            int64_t at = (row * s->slot_k.row + found.lost[i]) * heads + head;
            decode(&s->window_k, s->near_bits, row, head, heads, token, 1, s->width, wide, tile);
            encode(&s->slot_k, s->slot_bits, at, tile, s->width, tile + wide);
            at = (row * s->slot_v.row + found.lost[i]) * heads + head;
            decode(&s->window_v, s->near_bits, row, head, heads, token, 1, s->values, wide, tile);
            encode(&s->slot_v, s->slot_bits, at, tile, s->values, tile + wide);
        }
        for (int64_t i = 0; i < slots; i++) s->slot_received[first + i * heads] *= (float)s->fading;
    }
    shift_held(&s->window_k, s->near_bits, row, heads, s->width, s->room);
    shift_held(&s->window_v, s->near_bits, row, heads, s->values, s->room);
    shift(s->window_score + row * s->window_row * heads, heads * 4, s->room);
    shift(s->window_received + row * s->window_row * heads, heads * 4, s->room);
}

/* Write a row's token into its place: a sink's or the window's. */
static void write_row(const Step *s, int64_t row, int64_t count, int64_t place, float *work) {
    int64_t heads = s->heads, width = s->width, values = s->values, inputs = heads * (width + values);
    int64_t wide = up(most(width, values), WIDE), at = place < 0 ? count : place;
    const Held *k = place < 0 ? &s->sink_k : &s->window_k, *v = place < 0 ? &s->sink_v : &s->window_v;
    float *of_score = work + 3 * wide; /* keys without positions, and values as they are stored */
    memcpy(of_score, s->k + row * heads * width, (size_t)(heads * width) * sizeof(float));
    for (int64_t head = 0; head < heads; head++) {
        const float *key = s->key + (row * heads + head) * width, *value = s->v + (row * heads + head) * values;
        for (int64_t d = 0; d < width; d++)
            work[d] = s->key_scale ? fmaf(s->key_scale[head * width + d], key[d], s->key_shift[head * width + d]) : key[d];
        encode(k, s->near_bits, (row * k->row + at) * heads + head, work, width, work + wide);
        encode(v, s->near_bits, (row * v->row + at) * heads + head, value, values, work + wide);
        decode(v, s->near_bits, row, head, heads, at, 1, values, wide, work + 2 * wide);
        memcpy(of_score + heads * width + head * values, work + 2 * wide, (size_t)values * sizeof(float));
    }
    if (place < 0) return;
    for (int64_t head = 0; head < heads; head++) {
        float found = 0;
        if (s->score) {
            found = s->score[row * heads + head];
        } else {
            const float *weight = s->score_weight + head * (inputs + 1);
            vec total = all(0);
            int64_t i = 0;
            for (; i + LANES <= inputs; i += LANES) total += load(weight + i) * load(of_score + i);
            found = sum_of(total);
            for (; i < inputs; i++) found += weight[i] * of_score[i];
            found += weight[inputs];
        }
        s->window_score[(row * s->window_row + place) * heads + head] = found;
    }
}

static void attend_head(const Step *s, int64_t row, int64_t head, int64_t count, int64_t place, int64_t merged, float *work) {
    int64_t heads = s->heads, groups = s->groups, width = s->width, values = s->values;
    int64_t wide = up(width, WIDE), deep = up(values, WIDE), filled = least(merged * BLOCK, s->slots);
    int64_t sinks = least(s->sinks, count + 1), near = most(place + 1, 0), total = sinks + near + filled;
    int64_t stride = up(total, LANES), starts[3] = {0, sinks, sinks + near}, counts[3] = {sinks, near, filled};
    const Held *keys[3] = {&s->sink_k, &s->window_k, &s->slot_k}, *vals[3] = {&s->sink_v, &s->window_v, &s->slot_v};
    float *q = work, *turned = q + groups * wide, *tile = turned + groups * wide, *shares = tile + TILE * most(wide, deep);
    float *sums = shares + groups * stride, *slot_sums = sums + groups * deep;
    memset(q, 0, (size_t)(2 * groups * wide) * sizeof(float));
    memset(tile, 0, (size_t)(TILE * most(wide, deep)) * sizeof(float));
    memset(sums, 0, (size_t)(2 * groups * deep) * sizeof(float));
    for (int64_t g = 0; g < groups; g++) {
        const float *given = s->q + ((row * heads + head) * groups + g) * width;
        for (int64_t d = 0; d < width; d++) {
            float x = given[d] * (float)s->scale;
            q[g * wide + d] = s->key_scale ? x / s->key_scale[head * width + d] : x;
        }
        memcpy(turned + g * wide, q + g * wide, (size_t)wide * sizeof(float));
        if (s->slot_bits == 4) turn(turned + g * wide, width);
        for (int64_t i = total; i < stride; i++) shares[g * stride + i] = -INFINITY;
    }
    for (int part = 0; part < 3; part++)
        for (int64_t t = 0; t < counts[part]; t += TILE) {
            int64_t tokens = least(TILE, counts[part] - t);
            decode(keys[part], part < 2 ? s->near_bits : s->slot_bits, row, head, heads, t, tokens, width, wide, tile);
            scores_of(part < 2 ? q : turned, groups, tile, tokens, wide, shares + starts[part] + t, stride);
        }
    memset(tile, 0, (size_t)(TILE * most(wide, deep)) * sizeof(float));
    for (int64_t g = 0; g < groups; g++) {
        float *own = shares + g * stride;
        if (s->softcap > 0) {
            cap(own, stride, (float)s->softcap);
            for (int64_t i = total; i < stride; i++) own[i] = -INFINITY;
        }
        vec top = all(-INFINITY), sum = all(0);
        for (int64_t i = 0; i < stride; i += LANES) {
            vec x = load(own + i);
            top = pick(x > top, x, top);
        }
        float largest = largest_of(top);
        for (int64_t i = 0; i < stride; i += LANES) {
            vec x = exponential(load(own + i) - largest);
            keep(own + i, x);
            sum += x;
        }
        float whole = sum_of(sum), inverse = 1 / whole;
        for (int64_t i = 0; i < stride; i += LANES) keep(own + i, load(own + i) * inverse);
        if (s->logs) s->logs[(row * heads + head) * groups + g] = largest + logf(whole);
    }
    int64_t distant = most(near - s->window / 4, 0);
    for (int64_t i = 0; i < distant + filled; i++) {
        int64_t from = i < distant ? sinks + i : sinks + near + i - distant;
        float received = 0;
        for (int64_t g = 0; g < groups; g++) received += shares[g * stride + from];
        if (i < distant) s->window_received[(row * s->window_row + i) * heads + head] += received;
        else s->slot_received[(row * s->slot_row + i - distant) * heads + head] += received;
    }
    for (int part = 0; part < 3; part++)
        for (int64_t t = 0; t < counts[part]; t += TILE) {
            int64_t tokens = least(TILE, counts[part] - t);
            decode(vals[part], part < 2 ? s->near_bits : s->slot_bits, row, head, heads, t, tokens, values, deep, tile);
            add_values(shares + starts[part] + t, stride, groups, tile, tokens, deep, part < 2 ? sums : slot_sums);
        }
    for (int64_t g = 0; g < groups; g++) {
        float *to = s->y + ((row * heads + head) * groups + g) * values;
        if (s->slot_bits == 4) turn(slot_sums + g * deep, values);
        for (int64_t c = 0; c < values; c++) to[c] = sums[g * deep + c] + slot_sums[g * deep + c];
    }
}

typedef struct {
    const Step *of;
    float *work;
    int64_t size; /* numbers of `work` that a thread has */
} Rows;

static void write_share(void *given, int64_t row, int64_t thread) {
    const Rows *r = given;
    const Step *s = r->of;
    float *work = r->work + thread * r->size;
    if (s->reads_only || (s->real && s->real[row] <= 0)) return;
    int64_t count = s->counts[row], merged = merged_of(s, count + 1);
    if (merged > merged_of(s, count)) merge_row(s, row, merged - 1, work, work + 6 * (s->slots + BLOCK));
    write_row(s, row, count, count - s->sinks - merged * BLOCK, work);
}

static void attend_share(void *given, int64_t at, int64_t thread) {
    const Rows *r = given;
    const Step *s = r->of;
    int64_t row = at / s->heads, count = s->counts[row], merged = merged_of(s, count + 1);
    if (s->real && s->real[row] <= 0) return;
    attend_head(s, row, at % s->heads, count, count - s->sinks - merged * BLOCK, merged, r->work + thread * r->size);
}

/* All rows. Returns 0, or 1 if there is no memory. */
int step(const Step *s, int64_t threads) {
    int64_t wide = up(most(s->width, s->values), WIDE), places = up(s->sinks + s->room + s->slots, LANES);
    int64_t size = s->groups * (4 * wide + places) + TILE * wide;
    size = most(size, 6 * (s->slots + BLOCK) + 2 * wide);
    size = up(most(size, 3 * wide + s->heads * (s->width + s->values)) + LANES, 16);
    Rows rows = {s, aligned((size_t)(size * threads)), size};
    if (!rows.work) return 1;
    share(write_share, &rows, s->rows, threads);
    share(attend_share, &rows, s->rows * s->heads, threads);
    free(rows.work);
    return 0;
}
