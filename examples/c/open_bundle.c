/* Run on the fastest bundle that is installed, else on the library that this program was linked with.
 *
 *     export PKG_CONFIG_PATH=FOLDER    # of a universal bundle: it runs on every CPU
 *     make open_bundle && ./open_bundle "$(bitgen bundle pick --path)"
 *
 * The exit status is 0 when a product is right; what is wrong with a bundle is on standard error.
 */
#include <bitgen.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

enum { M = 64, K = 256 };

/* The functions that this program calls, of whichever library. */
struct functions {
    int32_t (*create)(bitgen_context **, int32_t, uint32_t);
    void (*destroy)(bitgen_context *);
    int32_t (*packed_bytes)(const bitgen_context *, int64_t, int64_t, size_t *);
    int32_t (*pack)(bitgen_context *, const int8_t *, int64_t, int64_t, void *, size_t);
    int32_t (*accumulate)(bitgen_context *, const void *, const int8_t *, int64_t, int64_t, int64_t, int32_t *);
    int32_t (*choice)(const bitgen_context *, const void *, int64_t, int32_t *);
    int32_t (*info)(int32_t, struct bitgen_kernel_info *);
};

static struct functions functions_of(void *library)
{
    struct functions f;
    *(void **)&f.create = dlsym(library, "bitgen_context_create");
    *(void **)&f.destroy = dlsym(library, "bitgen_context_destroy");
    *(void **)&f.packed_bytes = dlsym(library, "bitgen_packed_bytes");
    *(void **)&f.pack = dlsym(library, "bitgen_pack");
    *(void **)&f.accumulate = dlsym(library, "bitgen_accumulate");
    *(void **)&f.choice = dlsym(library, "bitgen_kernel_choice");
    *(void **)&f.info = dlsym(library, "bitgen_kernel_info");
    return f;
}

/* A product of ones with each library must be K in every row. */
static int run(const struct functions *f)
{
    static int8_t w[M * K], x[K];
    int32_t sums[M], index;
    size_t bytes;
    struct bitgen_kernel_info kernel;
    bitgen_context *ctx;
    for (int i = 0; i < M * K; ++i) w[i] = 1;
    for (int i = 0; i < K; ++i) x[i] = 1;
    if (f->create(&ctx, 1, 0) || f->packed_bytes(ctx, M, K, &bytes)) return 1;
    void *memory = malloc(bytes + 64);
    void *packed = (void *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    if (!memory || f->pack(ctx, w, M, K, packed, bytes) || f->accumulate(ctx, packed, x, 1, M, K, sums)) return 1;
    if (f->choice(ctx, packed, 1, &index) || f->info(index, &kernel)) return 1;
    for (int i = 0; i < M; ++i)
        if (sums[i] != K) return 1;
    printf("OK: %s\n", kernel.name);
    f->destroy(ctx);
    free(memory);
    return 0;
}

int main(int argc, char **argv)
{
    struct functions f = {bitgen_context_create, bitgen_context_destroy, bitgen_packed_bytes, bitgen_pack,
                          bitgen_accumulate,     bitgen_kernel_choice,   bitgen_kernel_info};
    void *library = NULL;
    char reason[512];
    if (argc > 1) {
        const int32_t code = bitgen_bundle_open(argv[1], &library, reason, sizeof reason);
        if (code) fprintf(stderr, "%s; going on without it\n", reason);
        else f = functions_of(library);
    }
    const int failed = run(&f);
    if (library) dlclose(library);
    return failed;
}
