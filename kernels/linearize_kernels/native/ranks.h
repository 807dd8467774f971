/* The choice of a merge, shared by prompts and steps. */

/* What ranks depend on; `slots.py` of the model says what it means. */
typedef struct {
    float weight, fading, least_attention, least_spread, most_against;
} Ranking;

typedef struct {
    int count;                        /* slots that get another token, the first ones of `lost` */
    int32_t lost[BLOCK], kept[BLOCK]; /* places without a token afterwards, ascending; the block's tokens that stay */
} Merge;

INLINE void standardise(float *x, const uint8_t *exists, int64_t end, int64_t there, float least_spread) {
    double mean = 0, spread = 0;
    for (int64_t i = 0; i < end; i++)
        if (exists[i]) mean += x[i];
    mean /= (double)there;
    for (int64_t i = 0; i < end; i++)
        if (exists[i]) spread += (x[i] - mean) * (x[i] - mean);
    spread = sqrt(spread / (double)there);
    if (spread < least_spread) spread = least_spread;
    for (int64_t i = 0; i < end; i++) x[i] = (float)((x[i] - mean) / spread);
}

/* Rank the `filled` tokens in the slots and the block's, whose scores lie behind those of all slots.
   `work` holds 2 * (slots + BLOCK) numbers, `exists` slots + BLOCK flags. */
static void choose(const Ranking *how, const float *score, const float *received, const float *queries, int64_t slots,
                   int64_t filled, float *work, uint8_t *exists, Merge *found) {
    int64_t end = slots + BLOCK, empty = least(slots - filled, BLOCK), take = BLOCK - empty;
    int32_t lowest[BLOCK];
    float rank[BLOCK];
    int held = 0;
    if (take > 0) {
        float *fixed = work, *attention = work + end;
        for (int64_t i = 0; i < end; i++) {
            exists[i] = i < filled || i >= slots;
            fixed[i] = exists[i] ? score[i] : 0;
            attention[i] = exists[i] ? logf(received[i] / queries[i] + how->least_attention) : 0;
        }
        standardise(fixed, exists, end, filled + BLOCK, how->least_spread);
        standardise(attention, exists, end, filled + BLOCK, how->least_spread);
        /* The lowest ranks, sorted; few candidates come in. */
        for (int64_t i = 0; i < end; i++) {
            if (!exists[i]) continue;
            float against = attention[i] > -how->most_against ? attention[i] : -how->most_against;
            float x = fixed[i] + how->weight * against;
            if (held == take && !(x < rank[held - 1])) continue;
            int at = held < take ? held++ : held - 1;
            while (at > 0 && x < rank[at - 1]) {
                rank[at] = rank[at - 1];
                lowest[at] = lowest[at - 1];
                at--;
            }
            rank[at] = x;
            lowest[at] = (int32_t)i;
        }
    }
    for (int64_t i = 0; i < empty; i++) lowest[held++] = (int32_t)(filled + i);
    for (int i = 1; i < BLOCK; i++) {
        int32_t x = lowest[i];
        int at = i;
        for (; at > 0 && lowest[at - 1] > x; at--) lowest[at] = lowest[at - 1];
        lowest[at] = x;
    }
    memcpy(found->lost, lowest, sizeof lowest);
    found->count = 0;
    while (found->count < BLOCK && lowest[found->count] < slots) found->count++;
    int next = found->count, stays = 0;
    for (int32_t token = 0; token < BLOCK; token++) {
        if (next < BLOCK && lowest[next] == slots + token) next++;
        else found->kept[stays++] = token;
    }
}

/* The number of queries that could attend to a token of this age in blocks, faded as their attention is. */
INLINE float expected_queries(int64_t age, int64_t window, float fading) {
    double faded = pow(fading, (double)age);
    return (float)(faded * (double)(window - window / 4 + BLOCK / 2) + BLOCK * (1 - faded) / (1 - fading));
}
