/* The public functions: they check, choose a kernel and call bitgen_run. See bitgen.h. */
#define _POSIX_C_SOURCE 200809L

#include <stdlib.h>
#include <string.h>

#include "arch.h"
#include "system.h"
#include "table.h"

enum { THREADS_MAX = 1024, ALIGNMENT = 64, HEADER_BYTES = sizeof(struct bitgen_packed_header) };

_Static_assert(sizeof(struct bitgen_packed_header) == ALIGNMENT, "blocks start at the next 64 bytes");

int32_t bitgen_abi_version(void) { return BITGEN_ABI_VERSION; }

const char *bitgen_version(void) { return bitgen_version_text; }

int32_t bitgen_struct_sizes(int32_t *kernel_info, int32_t *packed_header)
{
    if (!kernel_info || !packed_header) return BITGEN_ERROR_NULL;
    *kernel_info = sizeof(struct bitgen_kernel_info);
    *packed_header = sizeof(struct bitgen_packed_header);
    return BITGEN_OK;
}

const char *bitgen_error_message(int32_t code)
{
    static const char *const messages[] = {
        [BITGEN_OK] = "no error",
        [BITGEN_ERROR_NULL] = "a pointer is NULL",
        [BITGEN_ERROR_ARGUMENT] = "threads, flags or an index are out of range",
        [BITGEN_ERROR_SHAPE] = "m, k or n is out of range, or not the shape these weights were packed for",
        [BITGEN_ERROR_SCALE_COUNT] = "w_scale_count must be 1 (one scale for the tensor) or m (one a row)",
        [BITGEN_ERROR_ALIGNMENT] = "packed weights must lie at a multiple of 64 bytes",
        [BITGEN_ERROR_BUFFER_SIZE] = "the buffer is smaller than packed weights of this shape",
        [BITGEN_ERROR_NOT_PACKED] = "these are not weights packed by a bitgen library, or they are damaged",
        [BITGEN_ERROR_LAYOUT_VERSION] = "these weights were packed by a library with other layouts: pack them again",
        [BITGEN_ERROR_LAYOUT] = "these weights are packed in a layout this library has no kernels for: pack them again",
        [BITGEN_ERROR_NOT_TERNARY] = "a weight is not -1, 0 or 1",
        [BITGEN_ERROR_NOT_FINITE] = "the activations or logits hold NaN or infinity",
        [BITGEN_ERROR_BUSY] = "the context serves another call: use one context for each caller",
        [BITGEN_ERROR_FORKED] = "the context belongs to the parent process: create one after fork()",
        [BITGEN_ERROR_UNSUPPORTED_CPU] = "this CPU lacks features the library needs: see bitgen_missing_features()",
        [BITGEN_ERROR_MEMORY] = "out of memory",
        [BITGEN_ERROR_THREADS] = "the system gave no more threads",
        [BITGEN_ERROR_MODEL] = "the dimensions, types or pointers of a model do not fit together",
        [BITGEN_ERROR_TOKENS] = "a token, position or sequence is out of range",
        [BITGEN_ERROR_STRUCT] =
            "a struct has another size than in this library: set its size, or compile with its header",
        [BITGEN_ERROR_SCALES] = "a scale of a group is not finite, or no half float and to be stored as one",
        [BITGEN_ERROR_BUNDLE] = "the folder holds no bundle, or one of another ABI, damaged, or that others can change",
        [BITGEN_ERROR_CODES] = "a code has too many bits, a value of a table is -128, or a table is not there",
        [BITGEN_ERROR_GROUPS] = "weights with a scale for each group have no integer sums over all of k",
        [BITGEN_ERROR_TILES] = "the system refuses this process the tile registers (AMX) of its CPU",
        [BITGEN_ERROR_ISA_CAP] =
            "the environment variable BITGEN_ISA_CAP holds no ISA level of this CPU's architecture",
    };
    int32_t count = sizeof messages / sizeof *messages;
    return code >= 0 && code < count ? messages[code] : "unknown error code";
}

/* --- this CPU, as the environment wants it seen --- */

/* Whether `name` is that of a level, written in capitals or with dashes too. */
static int names_level(const char *name, const char *isa)
{
    for (; *name && *isa; ++name, ++isa) {
        const char c = *name == '-' ? '_' : *name >= 'A' && *name <= 'Z' ? (char)(*name - 'A' + 'a') : *name;
        if (c != *isa) return 0;
    }
    return *name == *isa;
}

/* What BITGEN_ISA_CAP allows: everything where it is empty or not set, NULL when it names no level. */
static const struct bitgen_isa_cap *isa_cap(void)
{
    static const struct bitgen_isa_cap none = {"", UINT64_MAX, INT32_MAX};
    const char *name = getenv("BITGEN_ISA_CAP");
    if (!name || !*name) return &none;
    for (int32_t i = 0; i < bitgen_isa_cap_count; ++i)
        if (names_level(name, bitgen_isa_caps[i].isa)) return &bitgen_isa_caps[i];
    return NULL;
}

static uint64_t cpu_features(void)
{
    const struct bitgen_isa_cap *cap = isa_cap();
    return cap ? bitgen_cpu_features() & cap->features : 0;
}

static int32_t sve_bytes(void)
{
    const struct bitgen_isa_cap *cap = isa_cap();
    const int32_t bytes = bitgen_sve_bytes();
    return cap && bytes <= cap->sve_bytes ? bytes : 0;
}

/* --- the table of kernels --- */

static uint64_t missing_features(void) { return bitgen_required_features & ~cpu_features(); }

static char missing_text[1024];

static void write_missing_text(void)
{
    uint64_t missing = missing_features();
    for (int32_t i = 0; i < bitgen_feature_count; ++i) {
        size_t used = strlen(missing_text), more = strlen(bitgen_feature_names[i]);
        if (!(missing >> i & 1) || used + more + 2 > sizeof missing_text) continue;
        if (used) missing_text[used++] = ' ';
        memcpy(missing_text + used, bitgen_feature_names[i], more + 1);
    }
}

const char *bitgen_missing_features(void)
{
    static bitgen_once once = BITGEN_ONCE;
    bitgen_run_once(&once, write_missing_text);
    return missing_text;
}

int32_t bitgen_kernel_count(void) { return bitgen_entry_count; }

int32_t bitgen_kernel_info(int32_t index, struct bitgen_kernel_info *info)
{
    if (!info) return BITGEN_ERROR_NULL;
    if (index < 0 || index >= bitgen_entry_count) return BITGEN_ERROR_ARGUMENT;
    const struct bitgen_entry *entry = &bitgen_entries[index];
    const struct bitgen_kernel *kernel = entry->kernel;
    *info = (struct bitgen_kernel_info){
        .name = kernel->name,
        .isa = kernel->isa,
        .family = kernel->family,
        .schedule = kernel->schedule,
        .m = entry->m,
        .k = entry->k,
        .n_min = kernel->n_min,
        .n_max = kernel->n_max,
        .threads = entry->threads,
        .row_block = kernel->row_block,
    };
    return BITGEN_OK;
}

/* Whether an ISA level runs on a CPU with these features, in this thread. */
static int runs(int32_t isa_id, uint64_t features)
{
    const struct bitgen_isa *isa = &bitgen_isas[isa_id];
    return !(isa->features & ~features) && (!isa->sve_bytes || isa->sve_bytes == sve_bytes());
}

/* The forward step at the best ISA level for a CPU with these features; the last level needs none. */
static const struct bitgen_step_ops *select_ops(uint64_t features)
{
    int32_t i = 0;
    while (i < bitgen_step_level_count - 1 && !runs(bitgen_step_levels[i].isa_id, features)) ++i;
    return bitgen_step_levels[i].ops;
}

/* The lower the better for a context of `threads` on a CPU of this family: of a better ISA level; then kernels tuned on
 * this family, on none in particular, on another one, not tuned; then for the same number of threads, for the nearest
 * lower one, for the nearest higher one; then in the order of the table. */
static int64_t rank_of(const struct bitgen_entry *entry, int32_t threads, int32_t cpu_family)
{
    enum { SPAN = 4 * THREADS_MAX };
    const int64_t level = (int64_t)4 * SPAN * entry->kernel->isa_id;
    if (!entry->threads) return level + 3 * SPAN;
    const int64_t kin = !entry->cpu_family ? 1 : entry->cpu_family == cpu_family ? 0 : 2;
    const int64_t apart = threads - entry->threads;
    return level + kin * SPAN + (apart >= 0 ? apart : 2 * THREADS_MAX + entry->threads);
}

/* The entries whose ISA level runs on a CPU with these features, best first. */
static int32_t select_entries(struct bitgen_context *ctx, uint64_t features)
{
    ctx->entries = malloc(sizeof *ctx->entries * (size_t)bitgen_entry_count);
    if (!ctx->entries) return BITGEN_ERROR_MEMORY;
    const int32_t family = bitgen_cpu_family(), threads = ctx->threads;
    for (int32_t i = 0; i < bitgen_entry_count; ++i) {
        const struct bitgen_entry *entry = &bitgen_entries[i];
        if (!runs(entry->kernel->isa_id, features)) continue;
        int32_t at = ctx->entry_count++;
        for (; at > 0 && rank_of(ctx->entries[at - 1], threads, family) > rank_of(entry, threads, family); --at)
            ctx->entries[at] = ctx->entries[at - 1];
        ctx->entries[at] = entry;
    }
    return BITGEN_OK;
}

static int serves_shape(const struct bitgen_entry *entry, int64_t m, int64_t k)
{ return entry->m == 0 || (entry->m == m && entry->k == k); }

/* What decides the layout of weights besides their shape: groups (0: scales lie outside), their scales' type, and the
 * kind of weights. */
struct format {
    int64_t group;
    int32_t scale_type, kind;
};

/* The layout that the caller wants weights of (m, k) without groups to be packed in. */
struct bitgen_preference {
    int64_t m, k;
    const struct bitgen_layout *layout;
};

static struct bitgen_preference *preference_for(const struct bitgen_context *ctx, int64_t m, int64_t k)
{
    for (int32_t i = 0; i < ctx->preferred_count; ++i)
        if (ctx->preferred[i].m == m && ctx->preferred[i].k == k) return &ctx->preferred[i];
    return NULL;
}

/* The layout weights of (m, k) are packed in: the one that is preferred, else that of the first kernel for them; NULL
 * when no layout has such groups. */
static const struct bitgen_layout *layout_for(const struct bitgen_context *ctx, int64_t m, int64_t k,
                                              struct format format)
{
    const struct bitgen_preference *preferred =
        format.group || format.kind != BITGEN_WEIGHTS_TERNARY ? NULL : preference_for(ctx, m, k);
    if (preferred) return preferred->layout;
    for (int32_t i = 0; i < ctx->entry_count; ++i) { /* the generic kernels serve every shape */
        const struct bitgen_entry *entry = ctx->entries[i];
        if (entry->layout->group == format.group && entry->layout->kind == format.kind && serves_shape(entry, m, k))
            return entry->layout;
    }
    return NULL;
}

/* The kernel for n tokens of weights (m, k) in a layout. */
static const struct bitgen_entry *entry_for(const struct bitgen_context *ctx, const struct bitgen_layout *layout,
                                            int64_t m, int64_t k, int64_t n)
{
    for (int32_t i = 0;; ++i) { /* every layout has generic kernels for all n and every shape */
        const struct bitgen_entry *entry = ctx->entries[i];
        const struct bitgen_kernel *kernel = entry->kernel;
        if (entry->layout == layout && n >= kernel->n_min && n <= kernel->n_max && serves_shape(entry, m, k))
            return entry;
    }
}

/* --- contexts --- */

/* The features a context may use. Tile registers must be asked for, before there are threads: a process that is refused
 * them is one without, which is an error where the library requires them and generic kernels are not allowed. */
static int32_t usable_features(uint32_t flags, uint64_t *features)
{
    *features = flags & BITGEN_ONLY_GENERIC ? 0 : cpu_features();
    uint64_t tiles = 0;
    for (int32_t i = 0; i < bitgen_isa_count; ++i)
        if (!(bitgen_isas[i].features & ~*features)) tiles |= bitgen_isas[i].tiles;
    if (!tiles || !bitgen_ask_for_tiles()) return BITGEN_OK;
    *features &= ~tiles;
    return flags & BITGEN_ALLOW_GENERIC || !(tiles & bitgen_required_features) ? BITGEN_OK : BITGEN_ERROR_TILES;
}

static int32_t default_threads(void)
{
    const int32_t cores = bitgen_usable_cores();
    return cores == bitgen_tuned_cores ? bitgen_tuned_threads : cores;
}

int32_t bitgen_context_create(bitgen_context **out, int32_t threads, uint32_t flags)
{
    if (!out) return BITGEN_ERROR_NULL;
    *out = NULL;
    const uint32_t generic = BITGEN_ALLOW_GENERIC | BITGEN_ONLY_GENERIC;
    if (threads < 0 || threads > THREADS_MAX || flags & ~generic) return BITGEN_ERROR_ARGUMENT;
    if (!isa_cap()) return BITGEN_ERROR_ISA_CAP;
    if (!(flags & generic) && missing_features()) return BITGEN_ERROR_UNSUPPORTED_CPU;
    if (threads == 0) threads = default_threads();
    uint64_t features;
    int32_t code = usable_features(flags, &features);
    if (code) return code;
    bitgen_context *ctx = NULL;
    code = bitgen_context_open(&ctx, threads < THREADS_MAX ? threads : THREADS_MAX);
    if (code) return code;
    bitgen_settle_on_nodes(ctx);
    ctx->ops = select_ops(features);
    code = select_entries(ctx, features);
    if (code) bitgen_context_close(ctx);
    else *out = ctx;
    return code;
}

void bitgen_context_destroy(bitgen_context *ctx)
{
    if (ctx) bitgen_context_close(ctx);
}

int32_t bitgen_context_threads(const bitgen_context *ctx) { return ctx ? ctx->threads : 0; }

int32_t bitgen_context_nodes(const bitgen_context *ctx) { return ctx ? bitgen_count_nodes(ctx) : 0; }

int32_t bitgen_copy_to_nodes(bitgen_context *ctx, const void *from, void *to, size_t bytes)
{
    if (!ctx || !from || !to) return BITGEN_ERROR_NULL;
    const int32_t code = bitgen_enter(ctx);
    if (code) return code;
    bitgen_copy_by_nodes(ctx, from, to, bytes);
    bitgen_leave(ctx);
    return BITGEN_OK;
}

/* --- checks --- */

static int32_t check_shape(int64_t m, int64_t k)
{ return m >= 1 && m <= (int64_t)1 << 31 && k >= 1 && k <= BITGEN_K_MAX ? BITGEN_OK : BITGEN_ERROR_SHAPE; }

/* n, and that (n, m) and (n, k) matrices can be addressed. */
static int32_t check_tokens(int64_t n, int64_t m, int64_t k)
{
    if (n < 1 || n > INT32_MAX) return BITGEN_ERROR_SHAPE;
    int64_t widest = m > k ? m : k;
    return n <= PTRDIFF_MAX / 4 / widest ? BITGEN_OK : BITGEN_ERROR_SHAPE;
}

static size_t packed_bytes(const struct bitgen_layout *layout, int64_t scale_type, int64_t m, int64_t k)
{
    int64_t blocks = bitgen_layout_bytes(layout, bitgen_scale_bytes(scale_type), m, k);
    return HEADER_BYTES + (size_t)(blocks + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static int32_t check_address(const void *packed)
{
    if (!packed) return BITGEN_ERROR_NULL;
    return (uintptr_t)packed % ALIGNMENT ? BITGEN_ERROR_ALIGNMENT : BITGEN_OK;
}

/* The layout of packed weights whose header is right. */
static int32_t read_header(const void *packed, const struct bitgen_layout **layout)
{
    const struct bitgen_packed_header *header = packed;
    if (header->magic != BITGEN_PACKED_MAGIC) return BITGEN_ERROR_NOT_PACKED;
    if (header->layout_version != BITGEN_LAYOUT_VERSION) return BITGEN_ERROR_LAYOUT_VERSION;
    if (check_shape(header->m, header->k)) return BITGEN_ERROR_NOT_PACKED;
    if (header->scale_type > BITGEN_SCALE_F16) return BITGEN_ERROR_LAYOUT;
    if (header->scale_type != BITGEN_SCALE_F32 && !header->group) return BITGEN_ERROR_LAYOUT;
    for (int32_t i = 0; i < bitgen_layout_count; ++i) {
        *layout = &bitgen_layouts[i];
        if (strncmp(header->family, (*layout)->family, sizeof header->family)) continue;
        if (header->row_block != (uint32_t)(*layout)->row_block) continue;
        if (header->group != (uint32_t)(*layout)->group) continue;
        const size_t bytes = packed_bytes(*layout, header->scale_type, header->m, header->k);
        return header->bytes == bytes ? BITGEN_OK : BITGEN_ERROR_NOT_PACKED;
    }
    return BITGEN_ERROR_LAYOUT;
}

static int32_t check_weights(const void *packed, int64_t m, int64_t k, const struct bitgen_layout **layout)
{
    int32_t code = check_address(packed);
    if (!code) code = check_shape(m, k);
    if (!code) code = read_header(packed, layout);
    if (code) return code;
    const struct bitgen_packed_header *header = packed;
    return header->m == m && header->k == k ? BITGEN_OK : BITGEN_ERROR_SHAPE;
}

/* --- weights --- */

static int32_t find_layout(const bitgen_context *ctx, int64_t m, int64_t k, struct format format,
                           const struct bitgen_layout **layout)
{
    int32_t code = check_shape(m, k);
    if (code) return code;
    if (format.scale_type != BITGEN_SCALE_F32 && format.scale_type != BITGEN_SCALE_F16) return BITGEN_ERROR_ARGUMENT;
    *layout = layout_for(ctx, m, k, format);
    return *layout ? BITGEN_OK : BITGEN_ERROR_ARGUMENT;
}

/* What opens packed weights of (m, k). */
static struct bitgen_packed_header header_of(const struct bitgen_layout *layout, int32_t scale_type, int64_t m,
                                             int64_t k)
{
    struct bitgen_packed_header header = {
        .magic = BITGEN_PACKED_MAGIC,
        .layout_version = BITGEN_LAYOUT_VERSION,
        .row_block = (uint32_t)layout->row_block,
        .m = m,
        .k = k,
        .bytes = packed_bytes(layout, scale_type, m, k),
        .scale_type = (uint32_t)scale_type,
        .group = (uint32_t)layout->group,
    };
    strncpy(header.family, layout->family, sizeof header.family - 1);
    return header;
}

static int32_t tell_bytes(const bitgen_context *ctx, int64_t m, int64_t k, struct format format, size_t *bytes)
{
    const struct bitgen_layout *layout;
    if (!ctx || !bytes) return BITGEN_ERROR_NULL;
    int32_t code = find_layout(ctx, m, k, format, &layout);
    if (!code) *bytes = packed_bytes(layout, format.scale_type, m, k);
    return code;
}

static int32_t tell_layout(const bitgen_context *ctx, int64_t m, int64_t k, struct format format,
                           struct bitgen_packed_header *header)
{
    const struct bitgen_layout *layout;
    if (!ctx || !header) return BITGEN_ERROR_NULL;
    int32_t code = find_layout(ctx, m, k, format, &layout);
    if (!code) *header = header_of(layout, format.scale_type, m, k);
    return code;
}

static const struct format plain = {.scale_type = BITGEN_SCALE_F32};

static struct format grouped(int64_t group, int32_t scale_type)
{ return (struct format){.group = group, .scale_type = scale_type}; }

/* The layout of ternary weights without groups that a caller names; NULL: the library has no kernels for it. */
static const struct bitgen_layout *layout_named(const char *family, int32_t row_block)
{
    for (int32_t i = 0; i < bitgen_layout_count; ++i) {
        const struct bitgen_layout *layout = &bitgen_layouts[i];
        if (!layout->group && layout->kind == BITGEN_WEIGHTS_TERNARY && layout->row_block == row_block &&
            !strcmp(layout->family, family))
            return layout;
    }
    return NULL;
}

static int32_t prefer(bitgen_context *ctx, int64_t m, int64_t k, const struct bitgen_layout *layout)
{
    struct bitgen_preference *at = preference_for(ctx, m, k);
    if (!layout) { /* the last one takes its place */
        if (at) *at = ctx->preferred[--ctx->preferred_count];
        return BITGEN_OK;
    }
    if (!at) {
        at = realloc(ctx->preferred, sizeof *at * (size_t)(ctx->preferred_count + 1));
        if (!at) return BITGEN_ERROR_MEMORY;
        ctx->preferred = at;
        at += ctx->preferred_count++;
    }
    *at = (struct bitgen_preference){.m = m, .k = k, .layout = layout};
    return BITGEN_OK;
}

int32_t bitgen_prefer_layout(bitgen_context *ctx, int64_t m, int64_t k, const char *family, int32_t row_block)
{
    if (!ctx) return BITGEN_ERROR_NULL;
    int32_t code = check_shape(m, k);
    if (code) return code;
    const struct bitgen_layout *layout = family ? layout_named(family, row_block) : NULL;
    if (family && !layout) return BITGEN_ERROR_LAYOUT;
    code = bitgen_enter(ctx);
    if (code) return code;
    code = prefer(ctx, m, k, layout);
    bitgen_leave(ctx);
    return code;
}

int32_t bitgen_packed_bytes(const bitgen_context *ctx, int64_t m, int64_t k, size_t *bytes)
{ return tell_bytes(ctx, m, k, plain, bytes); }

int32_t bitgen_group_packed_bytes(const bitgen_context *ctx, int64_t m, int64_t k, int64_t group, int32_t scale_type,
                                  size_t *bytes)
{ return group ? tell_bytes(ctx, m, k, grouped(group, scale_type), bytes) : BITGEN_ERROR_ARGUMENT; }

int32_t bitgen_packed_layout(const bitgen_context *ctx, int64_t m, int64_t k, struct bitgen_packed_header *header)
{ return tell_layout(ctx, m, k, plain, header); }

int32_t bitgen_group_packed_layout(const bitgen_context *ctx, int64_t m, int64_t k, int64_t group, int32_t scale_type,
                                   struct bitgen_packed_header *header)
{ return group ? tell_layout(ctx, m, k, grouped(group, scale_type), header) : BITGEN_ERROR_ARGUMENT; }

/* The format of codes. */
static int32_t format_of(const struct bitgen_codes *codes, struct format *format)
{
    if (!codes) return BITGEN_ERROR_NULL;
    if (codes->size != sizeof *codes) return BITGEN_ERROR_STRUCT;
    if (codes->kind < BITGEN_WEIGHTS_Q4 || codes->kind > BITGEN_WEIGHTS_T3 ||
        (!codes->group && (codes->kind != BITGEN_WEIGHTS_Q1 || codes->scale_type != BITGEN_SCALE_F32)))
        return BITGEN_ERROR_ARGUMENT;
    *format = (struct format){codes->group, codes->scale_type, codes->kind};
    return BITGEN_OK;
}

int32_t bitgen_codes_packed_bytes(const bitgen_context *ctx, int64_t m, int64_t k, const struct bitgen_codes *codes,
                                  size_t *bytes)
{
    struct format format;
    int32_t code = format_of(codes, &format);
    return code ? code : tell_bytes(ctx, m, k, format, bytes);
}

int32_t bitgen_codes_packed_layout(const bitgen_context *ctx, int64_t m, int64_t k, const struct bitgen_codes *codes,
                                   struct bitgen_packed_header *header)
{
    struct format format;
    int32_t code = format_of(codes, &format);
    return code ? code : tell_layout(ctx, m, k, format, header);
}

int32_t bitgen_group_scale_type(const float *scales, int64_t count, int32_t *scale_type)
{
    if (!scales || !scale_type) return BITGEN_ERROR_NULL;
    if (count < 1) return BITGEN_ERROR_SHAPE;
    uint16_t half;
    int64_t i = 0;
    while (i < count && bitgen_is_half(scales[i], &half)) ++i;
    *scale_type = i == count ? BITGEN_SCALE_F16 : BITGEN_SCALE_F32;
    return BITGEN_OK;
}

/* The rows [row_begin, row_end) of (m, k); `weights` has these rows only. */
static int32_t pack_rows(bitgen_context *ctx, struct bitgen_weights weights, struct format format, int64_t row_begin,
                         int64_t row_end, int64_t m, void *packed, size_t bytes)
{
    const int32_t scale_type = format.scale_type;
    const int64_t k = weights.k;
    weights.scale_type = scale_type;
    const struct bitgen_layout *layout;
    int32_t code = check_address(packed);
    if (!code) code = find_layout(ctx, m, k, format, &layout);
    if (code) return code;
    size_t needed = packed_bytes(layout, scale_type, m, k);
    if (bytes < needed) return BITGEN_ERROR_BUFFER_SIZE;
    if (row_begin < 0 || row_begin >= row_end || row_end > m || row_begin % layout->row_block ||
        (row_end < m && row_end % layout->row_block))
        return BITGEN_ERROR_SHAPE;
    code = bitgen_enter(ctx);
    if (code) return code;
    /* No valid header before the weights are whole; padding up to the last 64 bytes is zero. */
    if (row_begin == 0) {
        memset(packed, 0, HEADER_BYTES);
        memset((uint8_t *)packed + needed - ALIGNMENT, 0, ALIGNMENT);
    }
    const int64_t before = bitgen_layout_bytes(layout, bitgen_scale_bytes(scale_type), row_begin, k);
    weights.m = row_end - row_begin;
    code = bitgen_pack_layout(ctx->pool, layout, &weights, (uint8_t *)packed + HEADER_BYTES + before);
    bitgen_leave(ctx);
    if (code || row_end < m) return code;
    struct bitgen_packed_header header = header_of(layout, scale_type, m, k);
    memcpy(packed, &header, sizeof header);
    return BITGEN_OK;
}

int32_t bitgen_pack_rows(bitgen_context *ctx, const int8_t *w, int64_t row_begin, int64_t row_end, int64_t m, int64_t k,
                         void *packed, size_t bytes)
{
    if (!ctx || !w) return BITGEN_ERROR_NULL;
    const struct bitgen_weights weights = {.w = w, .k = k};
    return pack_rows(ctx, weights, plain, row_begin, row_end, m, packed, bytes);
}

int32_t bitgen_pack_group_rows(bitgen_context *ctx, const int8_t *w, const float *scales, int64_t row_begin,
                               int64_t row_end, int64_t m, int64_t k, int64_t group, int32_t scale_type, void *packed,
                               size_t bytes)
{
    if (!ctx || !w || !scales) return BITGEN_ERROR_NULL;
    if (!group) return BITGEN_ERROR_ARGUMENT;
    const struct bitgen_weights weights = {.w = w, .scales = scales, .k = k};
    return pack_rows(ctx, weights, grouped(group, scale_type), row_begin, row_end, m, packed, bytes);
}

int32_t bitgen_pack_codes(bitgen_context *ctx, const struct bitgen_codes *codes, int64_t row_begin, int64_t row_end,
                          int64_t m, int64_t k, void *packed, size_t bytes)
{
    struct format format;
    int32_t code = format_of(codes, &format);
    if (code) return code;
    const int tables = bitgen_has_tables(format.kind), offsets = format.kind == BITGEN_WEIGHTS_Q4M;
    if (!ctx || !codes->codes || !codes->scales != !codes->group || !codes->tables != !tables ||
        !codes->offsets != !offsets)
        return BITGEN_ERROR_NULL;
    if (tables ? codes->table_count < 1 || codes->table_count > 4 : codes->table_count != 0)
        return BITGEN_ERROR_ARGUMENT;
    const struct bitgen_weights weights = {.scales = codes->scales, .k = k, .codes = codes};
    return pack_rows(ctx, weights, format, row_begin, row_end, m, packed, bytes);
}

int32_t bitgen_pack_groups(bitgen_context *ctx, const int8_t *w, const float *scales, int64_t m, int64_t k,
                           int64_t group, void *packed, size_t bytes)
{
    int32_t scale_type;
    if (check_shape(m, k)) return BITGEN_ERROR_SHAPE;
    if (group < 1) return BITGEN_ERROR_ARGUMENT;
    int32_t code = bitgen_group_scale_type(scales, m * bitgen_groups(k, group), &scale_type);
    return code ? code : bitgen_pack_group_rows(ctx, w, scales, 0, m, m, k, group, scale_type, packed, bytes);
}

int32_t bitgen_pack(bitgen_context *ctx, const int8_t *w, int64_t m, int64_t k, void *packed, size_t bytes)
{ return bitgen_pack_rows(ctx, w, 0, m, m, k, packed, bytes); }

int32_t bitgen_check_packed(const bitgen_context *ctx, const void *packed, size_t bytes, int64_t m, int64_t k)
{
    const struct bitgen_layout *layout;
    if (!ctx || !packed) return BITGEN_ERROR_NULL;
    if (bytes < HEADER_BYTES) return BITGEN_ERROR_BUFFER_SIZE;
    int32_t code = check_weights(packed, m, k, &layout);
    if (code) return code;
    return bytes < ((const struct bitgen_packed_header *)packed)->bytes ? BITGEN_ERROR_BUFFER_SIZE : BITGEN_OK;
}

/* --- multiplication --- */

int32_t bitgen_kernel_choice(const bitgen_context *ctx, const void *packed, int64_t n, int32_t *index)
{
    const struct bitgen_layout *layout;
    if (!ctx || !index) return BITGEN_ERROR_NULL;
    int32_t code = check_address(packed);
    if (!code) code = read_header(packed, &layout);
    if (code) return code;
    const struct bitgen_packed_header *header = packed;
    if (check_tokens(n, header->m, header->k)) return BITGEN_ERROR_SHAPE;
    *index = (int32_t)(entry_for(ctx, layout, header->m, header->k, n) - bitgen_entries);
    return BITGEN_OK;
}

int32_t bitgen_choose_kernel(const struct bitgen_context *ctx, const void *packed, int64_t m, int64_t k, int64_t n,
                             const struct bitgen_kernel **kernel)
{
    const struct bitgen_layout *layout;
    int32_t code = check_weights(packed, m, k, &layout);
    if (!code) code = check_tokens(n, m, k);
    if (!code) *kernel = entry_for(ctx, layout, m, k, n)->kernel;
    return code;
}

/* The weights of a call that has its inputs and outputs, and the kernel for both. */
static int32_t take_weights(const bitgen_context *ctx, const void *packed, struct bitgen_call *call)
{
    const int64_t rows = call->n < INT32_MAX ? bitgen_planes(call) * call->n : call->n;
    const int32_t code = bitgen_choose_kernel(ctx, packed, call->m, call->k, rows, &call->kernel);
    if (!code && call->quantize_planes && !call->kernel->group && call->k > BITGEN_INT16_K_MAX)
        return BITGEN_ERROR_SHAPE;
    if (!code) call->w = (const uint8_t *)packed + HEADER_BYTES;
    return code;
}

/* Scales of groups lie among the weights and take no others; `call` has its kernel, and w_scale as it was given. */
static int32_t place_scales(const void *packed, struct bitgen_call *call, int64_t w_scale_count)
{
    if (call->kernel->group) {
        if (call->w_scale || w_scale_count) return BITGEN_ERROR_SCALE_COUNT;
        call->w_scale_stride = bitgen_scale_bytes(((const struct bitgen_packed_header *)packed)->scale_type);
        return BITGEN_OK;
    }
    if (!call->w_scale) return BITGEN_ERROR_NULL;
    if (w_scale_count != 1 && w_scale_count != call->m) return BITGEN_ERROR_SCALE_COUNT;
    call->w_scale_stride = w_scale_count > 1;
    return BITGEN_OK;
}

int32_t bitgen_matmul_as(bitgen_context *ctx, const void *packed, const float *w_scale, int64_t w_scale_count,
                         int32_t x_type, const float *x, int64_t n, int64_t m, int64_t k, float *y)
{
    if (!ctx || !x || !y) return BITGEN_ERROR_NULL;
    if (x_type != BITGEN_X_INT8 && x_type != BITGEN_X_INT16) return BITGEN_ERROR_ARGUMENT;
    struct bitgen_call call = {.w_scale = w_scale, .x = x, .y = y, .m = m, .k = k, .n = n};
    if (x_type == BITGEN_X_INT16) call.quantize_planes = ctx->ops->quantize_planes;
    int32_t code = take_weights(ctx, packed, &call);
    if (!code) code = place_scales(packed, &call, w_scale_count);
    return code ? code : bitgen_run(ctx, &call);
}

int32_t bitgen_matmul(bitgen_context *ctx, const void *packed, const float *w_scale, int64_t w_scale_count,
                      const float *x, int64_t n, int64_t m, int64_t k, float *y)
{ return bitgen_matmul_as(ctx, packed, w_scale, w_scale_count, BITGEN_X_INT8, x, n, m, k, y); }

int32_t bitgen_accumulate(bitgen_context *ctx, const void *packed, const int8_t *xq, int64_t n, int64_t m, int64_t k,
                          int32_t *acc)
{
    if (!ctx || !xq || !acc) return BITGEN_ERROR_NULL;
    struct bitgen_call call = {.xq = xq, .acc = acc, .m = m, .k = k, .n = n};
    int32_t code = take_weights(ctx, packed, &call);
    if (!code && call.kernel->group) code = BITGEN_ERROR_GROUPS;
    return code ? code : bitgen_run(ctx, &call);
}

struct quantizing {
    const struct bitgen_kernel *kernel;
    const float *x;
    int8_t *xq, *rows; /* rows: one padded row for each thread */
    float *x_scale;
    int64_t k, k_pad;
    _Atomic int32_t not_finite;
};

static void quantize_body(void *arg, int32_t worker, int64_t begin, int64_t end)
{
    struct quantizing *q = arg;
    int8_t *row = q->rows + worker * q->k_pad;
    for (int64_t t = begin; t < end; ++t) {
        int32_t sum;
        if (q->kernel->quantize(q->x + t * q->k, q->k, q->k_pad, row, q->x_scale + t, &sum))
            atomic_store_explicit(&q->not_finite, 1, memory_order_relaxed);
        memcpy(q->xq + t * q->k, row, (size_t)q->k);
    }
}

int32_t bitgen_quantize(bitgen_context *ctx, const float *x, int64_t n, int64_t k, int8_t *xq, float *x_scale)
{
    if (!ctx || !x || !xq || !x_scale) return BITGEN_ERROR_NULL;
    if (check_shape(1, k) || check_tokens(n, 1, k)) return BITGEN_ERROR_SHAPE;
    int32_t code = bitgen_enter(ctx);
    if (code) return code;
    struct quantizing q = {
        .kernel = ctx->entries[0]->kernel, .x = x, .xq = xq, .x_scale = x_scale, .k = k, .k_pad = bitgen_x_stride(k)};
    code = bitgen_reserve(&ctx->x, ctx->threads * q.k_pad);
    q.rows = ctx->x.data;
    if (!code) bitgen_pool_run(ctx->pool, quantize_body, &q, n, 1 + (1 << 14) / k);
    bitgen_leave(ctx);
    if (code) return code;
    return atomic_load_explicit(&q.not_finite, memory_order_relaxed) ? BITGEN_ERROR_NOT_FINITE : BITGEN_OK;
}
