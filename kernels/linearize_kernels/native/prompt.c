/* Attention with landmarks over the tokens of a call, for one pair of row and key/value head after the other, or
   for some at a time with several threads.

   Threads share a block's queries, ROWS at a time: their scores with sinks, window and slots, one softmax, the attention
   that tokens receive, and the sums of values. What tokens receive is added up afterwards in the order of the queries, so
   results do not depend on the number of threads. Keys lie in panels of PANEL tokens, channel by channel, so that a vector
   holds the same channel of neighbours; the window is a run of the text's panels. All tensors are contiguous float32,
   numbers int32, indices int64. */

#include "threads.h"
#include "vectors.h"
#include "ranks.h"
#include "queries.h"

int64_t prompt_bytes(void) { return (int64_t)sizeof(Prompt); }

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

/* Pairs at a time, and what threads need. Each of the `shares` shares of a block's queries has a table of `told`. */
typedef struct {
    Pair *pairs;
    Scratch *scratch;
    int64_t shares, slots, told;
} Together;

static void open_pair(void *given, int64_t at_pair, int64_t thread) {
    Pair *w = ((Together *)given)->pairs + at_pair;
    const Prompt *p = w->of;
    (void)thread;
    int64_t slots = p->slots, row = w->row, head = w->head, total = p->total[row];
    w->merged = p->merged[row];
    w->filled = least(w->merged * BLOCK, slots);
    w->block = 0;
    w->start = most(p->first, p->offset[row]);
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
}

static void close_pair(void *given, int64_t at_pair, int64_t thread) {
    const Pair *w = ((Together *)given)->pairs + at_pair;
    const Prompt *p = w->of;
    (void)thread;
    int64_t slots = p->slots, row = w->row, head = w->head;
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

/* The next queries of a pair: at most those of BLOCK tokens, and of one block. 0 if all are done. */
static int next_queries(Pair *w) {
    const Prompt *p = w->of;
    int64_t last = least(p->first + p->queries, p->total[w->row]), limit = p->window - 1 + (w->block + 1) * BLOCK;
    if (w->block > p->merges || (!p->y && w->block == p->merges)) return 0;
    w->end = most(least(least(limit, last), w->start + BLOCK), w->start);
    return 1;
}

static void attend_share(void *given, int64_t at, int64_t thread) {
    Together *all_of = given;
    const Pair *w = all_of->pairs + at / all_of->shares;
    int64_t from = at % all_of->shares * ROWS, to = least(from + ROWS, (w->end - w->start) * w->of->groups);
    float *told = w->told + at % all_of->shares * all_of->told;
    Scratch *own = all_of->scratch + thread;
    if (from >= to) return;
    memset(told, 0, (size_t)all_of->told * sizeof(float));
    if (to - from == ROWS) attend(ROWS, w, own, from, told, told + all_of->slots), from = to;
    for (; to - from >= 4; from += 4) attend(4, w, own, from, told, told + all_of->slots);
    for (; from < to; from++) attend(1, w, own, from, told, told + all_of->slots);
}

/* Add up what was told, and merge the next block if no query needs it in the window. */
static void finish_share(void *given, int64_t at, int64_t thread) {
    Together *all_of = given;
    Pair *w = all_of->pairs + at;
    const Prompt *p = w->of;
    int64_t border = w->block * BLOCK, distant = w->end - border - p->window / 4;
    (void)thread;
    for (int64_t share = 0; share * ROWS < (w->end - w->start) * p->groups; share++) {
        const float *told = w->told + share * all_of->told;
        for (int64_t i = 0; i < w->filled; i++) w->attention[i] += told[i];
        for (int64_t j = 0; j < distant; j++) w->text_received[border + j] += told[all_of->slots + j];
    }
    w->start = w->end;
    int64_t limit = p->window - 1 + (w->block + 1) * BLOCK;
    if (w->end < least(limit, least(p->first + p->queries, p->total[w->row]))) return;
    w->block++;
    if (w->block > p->merges) return;
    if (p->total[w->row] <= p->window - 1 + w->block * BLOCK) w->block = p->merges + 1;
    else merge(w, w->block - 1);
}

/* All pairs of row and head. Returns 0, or 1 if there is no memory. */
int prompt(const Prompt *p, int64_t threads) {
    int64_t wide = p->y ? up(p->values, WIDE) : 0, width = p->width, slots = up(p->slots + BLOCK, PANEL);
    int64_t text = up(p->places, PANEL), sinks = up(p->sinks, PANEL), window = up(p->window + BLOCK, PANEL);
    int64_t shares = up(BLOCK * p->groups, ROWS) / ROWS, told = slots + window, pairs = p->rows * p->heads;
    int64_t of_pair[] = {text * width, text * wide, sinks * width, sinks * wide, slots * width, slots * wide,
                         slots, slots, slots, text, shares * told, 2 * slots, slots, slots, slots};
    int64_t of_thread[] = {(sinks + window + slots) * ROWS, width * ROWS, wide * ROWS};
    enum { PAIR = sizeof of_pair / sizeof *of_pair, THREAD = sizeof of_thread / sizeof *of_thread };
    /* Alone, a pair's slots stay in the processor's cache; with others, threads do not wait for merges. */
    int64_t abreast = least(threads > 1 ? 2 * threads : 1, pairs);
    Pair *w = calloc((size_t)abreast, sizeof *w);
    Scratch *scratch = calloc((size_t)threads, sizeof *scratch);
    Together together = {w, scratch, shares, slots, told};
    float **made = calloc((size_t)(abreast * PAIR + threads * THREAD), sizeof *made);
    int failed = !w || !scratch || !made;
    for (int64_t i = 0; i < abreast * PAIR && !failed; i++)
        failed = !(made[i] = aligned((size_t)(of_pair[i % PAIR] + PANEL)));
    float **own = made + abreast * PAIR;
    for (int64_t i = 0; i < threads * THREAD && !failed; i++)
        failed = !(own[i] = aligned((size_t)(of_thread[i % THREAD] + PANEL)));
    for (int64_t i = 0; i < threads && !failed; i++, own += THREAD) scratch[i] = (Scratch){own[0], own[1], own[2]};
    for (int64_t first = 0; first < pairs && !failed; first += abreast) {
        int64_t count = least(abreast, pairs - first);
        for (int64_t i = 0; i < count; i++) {
            float **m = made + i * PAIR;
            w[i] = (Pair){p, (first + i) / p->heads, (first + i) % p->heads, 0, 0, wide, 0, 0, 0,
                          m[0], p->y ? m[1] : NULL, m[2], m[3], m[4], m[5], m[6], m[7], m[8], m[9], m[10], m[11],
                          (int32_t *)m[12], (int32_t *)m[13], (uint8_t *)m[14]};
        }
        share(open_pair, &together, count, threads);
        for (;;) {
            int more = 0;
            for (int64_t i = 0; i < count; i++) more |= next_queries(w + i);
            if (!more) break;
            share(attend_share, &together, count * shares, threads);
            share(finish_share, &together, count, threads);
        }
        share(close_pair, &together, count, threads);
    }
    for (int64_t i = 0; made && i < abreast * PAIR + threads * THREAD; i++) free(made[i]);
    free(made);
    free(scratch);
    free(w);
    return failed;
}
