/* The arithmetic of reference.py in one pass over the memory, for the CPU. What is written here is what is computed
 * there, in the same order: compiled without contraction, it gives the same bits. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK (1ull << 31) /* positions that share a key */

typedef struct {
    uint32_t low, high;
} Key;

INLINE int32_t word_of(float x) {
    int32_t word;
    memcpy(&word, &x, 4);
    return word;
}

INLINE float float_of(int32_t word) {
    float x;
    memcpy(&x, &word, 4);
    return x;
}

/* An integer that is ordered as the float is, with NaNs beyond the infinities: integers have fast minima. */
INLINE int32_t ordered(int32_t word) { return word ^ ((word >> 31) & 0x7fffffff); }

/* noise.py: MurmurHash3's finaliser with the key's words injected. */
INLINE float uniform(uint32_t word, Key key) {
    word ^= key.low;
    word ^= word >> 16;
    word *= 0x85EBCA6Bu;
    word ^= key.high;
    word ^= word >> 13;
    word *= 0xC2B2AE35u;
    word ^= word >> 16;
    return (float)(int32_t)(word >> 8) * 0x1p-24f;
}

/* make_key(key, block): positions beyond 2**31 have keys of their own. */
static Key key_of(uint64_t key, uint64_t block) {
    if (block) {
        const uint64_t parts[2] = {key, block};
        key = 0;
        for (int i = 0; i < 2; i++) {
            key += parts[i] + 0x9E3779B97F4A7C15u;
            key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9u;
            key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
            key ^= key >> 31;
        }
    }
    return (Key){(uint32_t)key, (uint32_t)(key >> 32)};
}

INLINE void put_metadata(void *where, int64_t group, float value, int wide) {
    if (wide)
        ((float *)where)[group] = value;
    else
        ((uint16_t *)where)[group] = (uint16_t)((uint32_t)word_of(value) >> 16);
}

INLINE float get_metadata(const void *where, int64_t group, int wide) {
    return wide ? ((const float *)where)[group] : float_of((int32_t)((uint32_t)((const uint16_t *)where)[group] << 16));
}

/* Codes to bytes: byte j holds the codes j, j + m, j + 2m, ... A word at a time: no code leaves its byte. */
INLINE void pack(const uint8_t *restrict code, uint8_t *restrict bytes, int64_t m, int bits) {
#define PACK(type)                                                           \
    for (; j + (int64_t)sizeof(type) <= m; j += sizeof(type)) {              \
        type packed = 0, part;                                               \
        for (int lane = 0; lane < 8 / bits; lane++) {                        \
            memcpy(&part, code + j + lane * m, sizeof(type));                \
            packed |= (type)(part << (lane * bits));                         \
        }                                                                    \
        memcpy(bytes + j, &packed, sizeof(type));                            \
    }
    int64_t j = 0;
    PACK(uint64_t)
    PACK(uint32_t)
    PACK(uint8_t)
}

/* Bytes to codes. */
INLINE void unpack(const uint8_t *restrict bytes, uint8_t *restrict code, int64_t m, int bits) {
#define UNPACK(type)                                                         \
    for (; j + (int64_t)sizeof(type) <= m; j += sizeof(type)) {              \
        const type mask = (type)((type)-1 / 255 * ((1 << bits) - 1));        \
        type packed, part;                                                   \
        memcpy(&packed, bytes + j, sizeof(type));                            \
        for (int lane = 0; lane < 8 / bits; lane++) {                        \
            part = (type)(packed >> (lane * bits)) & mask;                   \
            memcpy(code + j + lane * m, &part, sizeof(type));                \
        }                                                                    \
    }
    int64_t j = 0;
    UNPACK(uint64_t)
    UNPACK(uint32_t)
    UNPACK(uint8_t)
}

/* packing.py: by width of a code, the widths that it is cut into, the upper bits first. */
static const uint8_t PLANES[13][3] = {
    {0}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}, {8, 1}, {8, 2}, {8, 2, 1}, {8, 4},
};

#define IS_WHOLE(bits) (!PLANES[bits][1])
#define EACH_PLANE(step) step(0) step(1) step(2) /* a loop, unrolled: each width is known when it is compiled */

INLINE int64_t packed_size(int64_t size, int bits) {
    int64_t m = 0;
#define SIZE_OF(k) m += (size * PLANES[bits][k] + 7) / 8;
    EACH_PLANE(SIZE_OF)
    return m;
}

/* Codes in two bytes each to the bytes of one plane after the other; `part` is scratch. */
INLINE void pack_planes(const uint16_t *restrict code, uint8_t *restrict part, uint8_t *restrict bytes, int64_t size,
                        int bits) {
    int shift = bits;
#define PACK_PLANE(k)                                                                                                 \
    if (PLANES[bits][k]) {                                                                                            \
        const int width = PLANES[bits][k];                                                                            \
        const int64_t m = (size * width + 7) / 8;                                                                     \
        shift -= width;                                                                                               \
        for (int64_t i = 0; i < size; i++) part[i] = (uint8_t)((code[i] >> shift) & ((1 << width) - 1));              \
        for (int64_t i = size; i < m * (8 / width); i++) part[i] = 0;                                                 \
        pack(part, bytes, m, width);                                                                                  \
        bytes += m;                                                                                                   \
    }
    EACH_PLANE(PACK_PLANE)
}

/* The way back. */
INLINE void unpack_planes(const uint8_t *restrict bytes, uint8_t *restrict part, uint16_t *restrict code, int64_t size,
                          int bits) {
    int shift = bits;
#define UNPACK_PLANE(k)                                                                                               \
    if (PLANES[bits][k]) {                                                                                            \
        const int width = PLANES[bits][k];                                                                            \
        const int64_t m = (size * width + 7) / 8;                                                                     \
        shift -= width;                                                                                               \
        unpack(bytes, part, m, width);                                                                                \
        for (int64_t i = 0; i < size; i++) code[i] = (uint16_t)((k ? code[i] : 0) | part[i] << shift);                \
        bytes += m;                                                                                                   \
    }
    EACH_PLANE(UNPACK_PLANE)
}

/* Stochastic rounding of elements whose noise starts at a position, to codes in a byte each, or in two. */
#define ROUND(name, type)                                                                                       \
    INLINE void name(const float *restrict x, int64_t size, int32_t top, float zero, float scale, Key key,      \
                     uint32_t position, type *restrict code) {                                                  \
        for (int64_t i = 0; i < size; i++) {                                                                    \
            const float p = (x[i] - zero) / scale; /* never below 0, and by rounding only above the top */      \
            const int32_t level = (int32_t)p;                                                                   \
            const int32_t rounded = level + (uniform(position + (uint32_t)i, key) < p - (float)level);          \
            code[i] = (type)(rounded < top ? rounded : top);                                                    \
        }                                                                                                       \
    }
ROUND(round_to_bytes, uint8_t)
ROUND(round_to_pairs, uint16_t)

INLINE void round_some(const float *x, int64_t size, int32_t top, float zero, float scale, Key key, uint32_t position,
                       int bits, uint16_t *code, int64_t first) {
    if (IS_WHOLE(bits))
        round_to_bytes(x + first, size, top, zero, scale, key, position, (uint8_t *)code + first);
    else
        round_to_pairs(x + first, size, top, zero, scale, key, position, code + first);
}

/* A group's codes: its noise may begin under one key, and end under the next. */
INLINE void round_group(const float *restrict x, int64_t size, int bits, float zero, float scale, uint64_t key,
                        Key block_key, uint64_t start, uint16_t *code) {
    const int32_t top = (1 << bits) - 1;
    if ((int64_t)(BLOCK - (start & (BLOCK - 1))) >= size) {
        round_some(x, size, top, zero, scale, block_key, (uint32_t)(start & (BLOCK - 1)), bits, code, 0);
        return;
    }
    for (int64_t i = 0; i < size; i++) {
        const uint64_t place = start + (uint64_t)i;
        round_some(x, 1, top, zero, scale, key_of(key, place / BLOCK), (uint32_t)(place & (BLOCK - 1)), bits, code, i);
    }
}

/* One group's codes: in two bytes each, or in one; and the bits of a plane in a byte each. */
typedef struct {
    uint16_t *code;
    uint8_t *part;
} Scratch;

/* Returns whether the group can't be quantized. */
INLINE int quantize_group(const float *restrict x, int64_t size, int bits, int64_t m, uint64_t key, Key block_key,
                          uint64_t start, int wide, Scratch scratch, uint8_t *restrict bytes, void *zeros,
                          void *scales, int64_t group) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < size; i++) {
        int32_t place = ordered(word_of(x[i]));
        least = place < least ? place : least;
        most = place > most ? place : most;
    }
    const float low = float_of(ordered(least)) + 0.0f, high = float_of(ordered(most)); /* of two zeros, the positive */
    const float top = (float)((1 << bits) - 1);
    float zero = low, scale;
    if (wide) {
        scale = (high - low) / top;
        scale = scale < 0x1p-100f ? 0x1p-100f : scale;
    } else { /* rounded outward: down, and up */
        uint32_t word = (uint32_t)word_of(low);
        zero = float_of((int32_t)((word + (word >> 31 ? 0xffffu : 0u)) & 0xffff0000u));
        scale = (high - zero) / top;
        scale = scale < 0x1p-100f ? 0x1p-100f : scale;
        scale = float_of((int32_t)(((uint32_t)word_of(scale) + 0xffffu) & 0xffff0000u));
    }
    if (!isfinite(zero + scale * top) || low != low || high != high) {
        memset(bytes, 0, m);
        put_metadata(zeros, group, NAN, wide);
        put_metadata(scales, group, 1.0f, wide);
        return 1;
    }
    if (low == high && !wide) { /* the 32 bits of a constant, spread over zero point, scale and codes */
        uint32_t word = (uint32_t)word_of(x[0]);
        ((uint16_t *)zeros)[group] = (uint16_t)(word >> 16);
        ((uint16_t *)scales)[group] = (uint16_t)(0x8000u | ((word & 0xffffu) >> 1));
        if (IS_WHOLE(bits)) {
            memset(bytes, word & 1 ? (bits == 1 ? 0xff : bits == 2 ? 0x55 : bits == 4 ? 0x11 : 1) : 0, m);
            return 0;
        }
        for (int64_t i = 0; i < size; i++) scratch.code[i] = word & 1;
    } else {
        put_metadata(zeros, group, zero, wide);
        put_metadata(scales, group, scale, wide);
        round_group(x, size, bits, zero, scale, key, block_key, start, scratch.code);
    }
    if (IS_WHOLE(bits)) {
        uint8_t *restrict code = (uint8_t *)scratch.code;
        for (int64_t i = size; i < m * (8 / bits); i++) code[i] = 0;
        pack(code, bytes, m, bits);
    } else
        pack_planes(scratch.code, scratch.part, bytes, size, bits);
    return 0;
}

INLINE void dequantize_group(const uint8_t *restrict bytes, int64_t size, int bits, int64_t m, float zero, float scale,
                             int wide, Scratch scratch, float *restrict x) {
    if (!wide && word_of(scale) < 0) { /* a constant: the last bit of its first code, and so of the last plane's */
        const int last = PLANES[bits][2] ? PLANES[bits][2] : PLANES[bits][1] ? PLANES[bits][1] : bits;
        const uint32_t bit = bytes[m - (size * last + 7) / 8] & 1, marked = (uint32_t)word_of(scale) >> 16;
        const float constant = float_of((int32_t)((uint32_t)word_of(zero) | (marked & 0x7fffu) << 1 | bit));
        for (int64_t i = 0; i < size; i++) x[i] = constant;
        return;
    }
    if (IS_WHOLE(bits)) {
        uint8_t *restrict code = (uint8_t *)scratch.code;
        unpack(bytes, code, m, bits);
        for (int64_t i = 0; i < size; i++) x[i] = (float)code[i] * scale + zero;
    } else {
        const uint16_t *restrict code = scratch.code;
        unpack_planes(bytes, scratch.part, scratch.code, size, bits);
        for (int64_t i = 0; i < size; i++) x[i] = (float)code[i] * scale + zero;
    }
}

/* What is the same for all groups of a call. */
typedef struct {
    int64_t size;
    int bits, wide;
    uint64_t key, start;
    float *x;
    uint8_t *codes;
    void *zeros, *scales;
} Groups;

INLINE int64_t quantize_range(const Groups *g, int64_t first, int64_t last, int64_t size, int bits, Scratch scratch) {
    const int64_t m = packed_size(size, bits);
    uint64_t block = (g->start + (uint64_t)(first * size)) / BLOCK;
    Key block_key = key_of(g->key, block);
    int64_t exact = 0;
    for (int64_t group = first; group < last; group++) {
        const uint64_t start = g->start + (uint64_t)(group * size);
        if (start / BLOCK != block) block_key = key_of(g->key, block = start / BLOCK);
        exact += quantize_group(g->x + group * size, size, bits, m, g->key, block_key, start, g->wide, scratch,
                                g->codes + group * m, g->zeros, g->scales, group);
    }
    return exact;
}

INLINE int64_t dequantize_range(const Groups *g, int64_t first, int64_t last, int64_t size, int bits, Scratch scratch) {
    const int64_t m = packed_size(size, bits);
    for (int64_t group = first; group < last; group++)
        dequantize_group(g->codes + group * m, size, bits, m, get_metadata(g->zeros, group, g->wide),
                         get_metadata(g->scales, group, g->wide), g->wide, scratch, g->x + group * size);
    return 0;
}

/* One copy of the code for each width that is common, and for the sizes that groups mostly have: with both known, it is
 * vectorized best. All others have one copy, or it would take long to compile. */
#define BY_SIZE(range, bits)                                        \
    switch (g->size) {                                              \
    case 16: return range(g, first, last, 16, bits, scratch);       \
    case 32: return range(g, first, last, 32, bits, scratch);       \
    case 64: return range(g, first, last, 64, bits, scratch);       \
    default: return range(g, first, last, g->size, bits, scratch);  \
    }
#define BY_BITS(range)                                              \
    switch (g->bits) {                                              \
    case 1: BY_SIZE(range, 1)                                       \
    case 2: BY_SIZE(range, 2)                                       \
    case 4: BY_SIZE(range, 4)                                       \
    case 8: BY_SIZE(range, 8)                                       \
    case 12: BY_SIZE(range, 12)                                     \
    default: return range(g, first, last, g->size, g->bits, scratch); \
    }

static int64_t quantize_some(const Groups *g, int64_t first, int64_t last, Scratch scratch) { BY_BITS(quantize_range) }

static int64_t dequantize_some(const Groups *g, int64_t first, int64_t last, Scratch scratch) {
    BY_BITS(dequantize_range)
}

/* Cut the groups among the threads. Returns how many can't be quantized, or -1 if there is no memory. */
INLINE int64_t on_threads(int64_t (*some)(const Groups *, int64_t, int64_t, Scratch), const Groups *g, int64_t groups,
                          int threads) {
    const int64_t room = (g->size + 63) / 64 * 64 + 64;
    uint8_t *scratch = malloc(3 * room * threads);
    if (!scratch) return -1;
    int64_t exact = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : exact) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        uint8_t *own = scratch + 3 * room * thread;
        exact += some(g, groups * thread / threads, groups * (thread + 1) / threads,
                      (Scratch){(uint16_t *)own, own + 2 * room});
    }
    free(scratch);
    return exact;
}

int64_t tinykg_quantize(float *x, int64_t groups, int64_t size, int bits, uint64_t key, uint64_t start, int wide,
                        uint8_t *codes, void *zeros, void *scales, int threads) {
    const Groups g = {size, bits, wide, key, start, x, codes, zeros, scales};
    return on_threads(quantize_some, &g, groups, threads);
}

int64_t tinykg_dequantize(uint8_t *codes, void *zeros, void *scales, int64_t groups, int64_t size, int bits, int wide,
                          float *out, int threads) {
    const Groups g = {size, bits, wide, 0, 0, out, codes, zeros, scales};
    return on_threads(dequantize_some, &g, groups, threads);
}

/* Rows of n codes to rows of bytes. */
void tinykg_pack(const uint8_t *codes, int64_t rows, int64_t n, int bits, uint8_t *out, int threads) {
#define PACK_ROW(bits) pack(codes + row * n, out + row * (n * bits / 8), n * bits / 8, bits)
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        switch (bits) {
        case 1: PACK_ROW(1); break;
        case 2: PACK_ROW(2); break;
        case 4: PACK_ROW(4); break;
        default: PACK_ROW(8);
        }
    }
}

/* -- masks: cuts.py ---------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t low, high; /* the ends' words */
    uint8_t below, within, above, nan;
    const void *level; /* of two levels, that which is not 0 */
} Cut;

/* Elements to codes. Returns whether one fits no class. */
typedef int Classify(const void *x, int64_t count, const Cut *cut, uint8_t *code);

/* Of each dtype: the type of its words; the type that they are compared as, and how they become that; which are NaN. */
#define CLASSIFY(name, word, type, value_of, is_nan)                                                            \
    INLINE int name##_classify(const void *from, int64_t count, const Cut *cut, int open, uint8_t *restrict code) { \
        const word *restrict x = from;                                                                          \
        const type low = value_of((word)cut->low), high = value_of((word)cut->high);                            \
        const uint8_t below = cut->below, within = cut->within, above = cut->above, nan = cut->nan;             \
        for (int64_t i = 0; i < count; i++) {                                                                   \
            const type value = value_of(x[i]);                                                                  \
            const uint8_t entered = (open ? value > low : value >= low) ? within : below;                       \
            const uint8_t left = (open ? value >= high : value > high) ? above : entered;                       \
            code[i] = is_nan(value) ? nan : left;                                                               \
        }                                                                                                       \
        return 0;                                                                                               \
    }                                                                                                           \
    static int name##_closed(const void *x, int64_t count, const Cut *cut, uint8_t *code) {                     \
        return name##_classify(x, count, cut, 0, code);                                                         \
    }                                                                                                           \
    static int name##_open(const void *x, int64_t count, const Cut *cut, uint8_t *code) {                       \
        return name##_classify(x, count, cut, 1, code);                                                         \
    }                                                                                                           \
    static int name##_two_levels(const void *from, int64_t count, const Cut *cut, uint8_t *restrict code) {     \
        const word *restrict x = from;                                                                          \
        const type level = value_of(*(const word *)cut->level);                                                 \
        int third = is_nan(level);                                                                              \
        for (int64_t i = 0; i < count; i++) {                                                                   \
            const type value = value_of(x[i]);                                                                  \
            code[i] = value != 0;                                                                               \
            third |= (value != 0) & (value != level);                                                           \
        }                                                                                                       \
        return third;                                                                                           \
    }                                                                                                           \
    static int64_t name##_zeros(const void *from, int64_t count) {                                              \
        const word *x = from;                                                                                   \
        int64_t i = 0;                                                                                          \
        while (i < count && value_of(x[i]) == 0) i++;                                                           \
        return i;                                                                                               \
    }

/* A half's words are ordered by sign and magnitude; any other float is one of C's, or becomes one. */
INLINE int16_t half_of(uint16_t word) { return (int16_t)(word & 0x8000 ? -(word & 0x7fff) : word); }
INLINE float bfloat_of(uint16_t word) { return float_of((int32_t)((uint32_t)word << 16)); }

INLINE double double_of(int64_t word) {
    double x;
    memcpy(&x, &word, 8);
    return x;
}

#define NAN_FLOAT(value) ((value) != (value))
#define NAN_HALF(value) ((value) > 0x7c00 || (value) < -0x7c00)

CLASSIFY(float32, int32_t, float, float_of, NAN_FLOAT)
CLASSIFY(float64, int64_t, double, double_of, NAN_FLOAT)
CLASSIFY(float16, uint16_t, int16_t, half_of, NAN_HALF)
CLASSIFY(bfloat16, uint16_t, float, bfloat_of, NAN_FLOAT)

/* In the order of DTYPES in cuts.py. */
static const struct {
    Classify *closed, *open, *two_levels;
    int64_t (*zeros)(const void *, int64_t);
    int64_t itemsize;
} DTYPES[] = {
#define DTYPE(name, itemsize) {name##_closed, name##_open, name##_two_levels, name##_zeros, itemsize}
    DTYPE(float32, 4), DTYPE(float64, 8), DTYPE(float16, 2), DTYPE(bfloat16, 2),
};

/* Bytes that are made at a time, of codes that stay in the nearest cache. */
#define TILE 128

/* A row of n elements to its m bytes. Returns whether an element fits no class. */
INLINE int pack_row(Classify *classify, const char *x, int64_t itemsize, int64_t n, const Cut *cut, int bits,
                    uint8_t *out, int64_t m) {
    uint8_t code[8 * TILE];
    int misfit = 0;
    for (int64_t j = 0; j < m; j += TILE) {
        const int64_t width = m - j < TILE ? m - j : TILE;
        for (int64_t lane = 0; lane < 8 / bits; lane++) {
            const int64_t first = lane * m + j, rest = n - first;
            const int64_t count = rest < 0 ? 0 : rest < width ? rest : width;
            misfit |= classify(x + first * itemsize, count, cut, code + lane * width);
            memset(code + lane * width + count, 0, (size_t)(width - count));
        }
        if (misfit) break;
        pack(code, out + j, width, bits);
    }
    return misfit;
}

static int pack_rows(Classify *classify, const void *x, int64_t itemsize, int64_t rows, int64_t n, const Cut *cut,
                     int bits, uint8_t *out, int threads) {
    const int64_t m = (n * bits + 7) / 8;
    int misfit = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : misfit) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        if (misfit) continue;
        const char *from = (const char *)x + row * n * itemsize;
        misfit |= bits == 1 ? pack_row(classify, from, itemsize, n, cut, 1, out + row * m, m)
                            : pack_row(classify, from, itemsize, n, cut, 2, out + row * m, m);
    }
    return misfit;
}

/* Rows of elements to rows of bytes; codes are those of below, within, above and NaN, two bits each. */
void tinykg_pack_classes(const void *x, int64_t rows, int64_t n, int dtype, int64_t low, int64_t high, int open,
                         int codes, int bits, uint8_t *out, int threads) {
    const Cut cut = {low, high, codes & 3, codes >> 2 & 3, codes >> 4 & 3, codes >> 6 & 3, NULL};
    Classify *const classify = open ? DTYPES[dtype].open : DTYPES[dtype].closed;
    pack_rows(classify, x, DTYPES[dtype].itemsize, rows, n, &cut, bits, out, threads);
}

/* The same of zeros and one other value, which is put where it is 0 still. Returns whether there is a third. */
int64_t tinykg_pack_two_levels(const void *x, int64_t rows, int64_t n, int dtype, void *value, uint8_t *out,
                               int threads) {
    const int64_t itemsize = DTYPES[dtype].itemsize;
    if (DTYPES[dtype].zeros(value, 1)) {
        const int64_t first = DTYPES[dtype].zeros(x, rows * n);
        if (first < rows * n) memcpy(value, (const char *)x + first * itemsize, (size_t)itemsize);
    }
    const Cut cut = {.level = value};
    return pack_rows(DTYPES[dtype].two_levels, x, itemsize, rows, n, &cut, 1, out, threads);
}

/* Rows of m bytes to rows of n levels, of any dtype as large as `type`. */
#define LEVELS(type, bits)                                                                               \
    for (int64_t lane = 0; lane < 8 / bits; lane++) {                                                    \
        const type a = ((const type *)levels)[0], b = ((const type *)levels)[1];                         \
        const type c = bits == 2 ? ((const type *)levels)[2] : a, d = bits == 2 ? ((const type *)levels)[3] : a; \
        const int64_t count = n - lane * m < m ? n - lane * m : m;                                       \
        type *restrict to = (type *)out + row * n + lane * m;                                            \
        for (int64_t j = 0; j < count; j++) {                                                            \
            const int code = (bytes[j] >> (lane * bits)) & ((1 << bits) - 1);                            \
            const type low = code & 1 ? b : a, high = code & 1 ? d : c;                                  \
            to[j] = code & 2 ? high : low;                                                               \
        }                                                                                                \
    }
#define LEVELS_OF(type)                    \
    if (bits == 1) {                       \
        LEVELS(type, 1)                    \
    } else {                               \
        LEVELS(type, 2)                    \
    }

void tinykg_unpack_levels(const uint8_t *codes, int64_t rows, int64_t m, int bits, const void *levels, int itemsize,
                          void *out, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t *restrict bytes = codes + row * m;
        switch (itemsize) {
        case 1: LEVELS_OF(uint8_t) break;
        case 2: LEVELS_OF(uint16_t) break;
        case 4: LEVELS_OF(uint32_t) break;
        default: LEVELS_OF(uint64_t)
        }
    }
}
