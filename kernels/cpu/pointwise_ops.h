// The operations of pointwise.c on one element type: T, its name NAME(..), and LOAD, STORE, LOAD_1, STORE_1 between it
// and float32.

static inline vf NAME(read)(const T *p, int64_t n) {
    if (n >= LANES) return LOAD(p);
    float x[LANES] = {};
    for (int64_t i = 0; i < n; i++) x[i] = LOAD_1(p[i]);
    return load(x);
}

static inline void NAME(write)(T *p, vf v, int64_t n) {
    if (n >= LANES) STORE(p, v);
    else
        for (int64_t i = 0; i < n; i++) p[i] = STORE_1(v[i]);
}

// residual may be null; else residual += x comes first, rounded to T.
static void NAME(norm_part)(const void *context, int64_t part, int64_t thread) {
    const struct norm *a = context;
    const T *x = a->x, *weight = a->weight;
    T *residual = a->residual, *out = a->out;
    int64_t hidden = a->hidden, x_stride = a->x_stride, residual_stride = a->residual_stride, parts = token_parts(a->num_tokens, a->num_tokens * hidden);
    float eps = a->eps;
    for (int64_t t = part_start(a->num_tokens, part, parts); t < part_start(a->num_tokens, part + 1, parts); t++) {
        const T *in = x + t * x_stride;
        vf squares = {};
        if (residual) {
            T *sum = residual + t * residual_stride;
            for (int64_t c = 0; c < hidden; c += LANES) {
                int64_t n = hidden - c;
                NAME(write)(sum + c, NAME(read)(in + c, n) + NAME(read)(sum + c, n), n);
                vf rounded = NAME(read)(sum + c, n);
                squares += rounded * rounded;
            }
            in = sum;
        } else
            for (int64_t c = 0; c < hidden; c += LANES) {
                vf value = NAME(read)(in + c, hidden - c);
                squares += value * value;
            }
        float factor = 1 / sqrtf(sum_of(squares) / (float)hidden + eps);
        for (int64_t c = 0; c < hidden; c += LANES) {
            int64_t n = hidden - c;
            NAME(write)(out + t * hidden + c, NAME(read)(in + c, n) * factor * NAME(read)(weight + c, n), n);
        }
    }
}

int NAME(rms_norm)(const struct norm *a) {
    kvshard_share_out(NAME(norm_part), a, token_parts(a->num_tokens, a->num_tokens * a->hidden), a->num_threads);
    return 0;
}

// One head, normed, turned and for int4 mixed, as float32 in x.
static void NAME(turn)(const struct rotary *a, const T *head, const T *norm, const float *cos_sin, float *x) {
    int64_t d = a->head_dim, half = a->half;
    vf squares = {};
    for (int64_t c = 0; c < d; c += LANES) {
        vf value = NAME(read)(head + c, d - c);
        squares += value * value;
        store(x + c, value);
    }
    if (norm) {
        float factor = 1 / sqrtf(sum_of(squares) / (float)d + a->eps);
        for (int64_t c = 0; c < d; c++) x[c] = x[c] * factor * LOAD_1(norm[c]);
    }
    for (int64_t c = 0; c < half; c++) {
        float first = x[c], second = x[c + half], cosine = cos_sin[c], sine = cos_sin[c + half];
        x[c] = first * cosine - second * sine;
        x[c + half] = second * cosine + first * sine;
    }
    if (a->cache_format == INT4) mix(x, d);
}

static void NAME(put)(const float *x, int64_t d, T *out) {
    for (int64_t c = 0; c < d; c += LANES) NAME(write)(out + c, load(x + c), d - c);
}

static void NAME(rotary_part)(const void *context, int64_t part, int64_t thread) {
    const struct rotary *a = context;
    int64_t d = a->head_dim, parts = token_parts(a->num_tokens, rotary_elements(a));
    for (int64_t t = part_start(a->num_tokens, part, parts); t < part_start(a->num_tokens, part + 1, parts); t++) {
        float x[MAX_DIM + LANES];
        const float *cos_sin = a->cos_sin + a->positions[t] * 2 * a->half;
        for (int64_t h = 0; h < a->num_q_heads; h++) {
            T *head = (T *)a->q + t * a->q_stride + h * a->q_head_stride;
            NAME(turn)(a, head, a->q_norm, cos_sin, x);
            NAME(put)(x, d, head);
        }
        int64_t slot = a->slot_mapping[t];
        for (int64_t h = 0; h < a->num_kv_heads && slot >= 0; h++) {
            int64_t at = (slot / a->block_size * a->num_kv_heads + h) * a->block_size + slot % a->block_size;
            const T *key = (const T *)a->k + t * a->k_stride + h * a->k_head_stride;
            const T *value = (const T *)a->v + t * a->v_stride + h * a->v_head_stride;
            NAME(turn)(a, key, a->k_norm, cos_sin, x);
            if (a->k_scale) {
                quantise(x, d, a->cache_format, a->k_cache, a->k_scale, at);
                for (int64_t c = 0; c < d; c++) x[c] = LOAD_1(value[c]);
                quantise(x, d, a->cache_format, a->v_cache, a->v_scale, at);
            } else {
                NAME(put)(x, d, (T *)a->k_cache + at * d);
                memcpy((T *)a->v_cache + at * d, value, (size_t)d * sizeof(T));
            }
        }
    }
}

int NAME(rotary_kv_write)(const struct rotary *a) {
    kvshard_share_out(NAME(rotary_part), a, token_parts(a->num_tokens, rotary_elements(a)), a->num_threads);
    return 0;
}

static void NAME(gated_part)(const void *context, int64_t part, int64_t thread) {
    const struct gated *a = context;
    T *out = a->out;
    int64_t inner = a->inner, parts = token_parts(a->num_tokens, a->num_tokens * inner);
    for (int64_t t = part_start(a->num_tokens, part, parts); t < part_start(a->num_tokens, part + 1, parts); t++)
        for (int64_t c = 0; c < inner; c += LANES) {
            int64_t n = inner - c;
            const T *in = (const T *)a->gate_up + t * a->stride + c;
            vf gate = NAME(read)(in, n), up = NAME(read)(in + inner, n);
            NAME(write)(out + t * inner + c, gated_of(gate, up, (int)a->gelu), n);
        }
}

int NAME(gated)(const struct gated *a) {
    kvshard_share_out(NAME(gated_part), a, token_parts(a->num_tokens, a->num_tokens * a->inner), a->num_threads);
    return 0;
}
