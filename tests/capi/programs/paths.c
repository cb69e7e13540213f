/* Loads each name as a guest of WAMR would, and one with a NUL inside. Usage: paths NAME... Prints the codes.
 * Has functions of its own under two of the library's names: the library calls its own nevertheless. */
#include "check.h"

wasi_nn_error init_backend_with_config(void **ctx, const char *config, uint32_t config_len)
{
    CHECK(!"the host's init_backend_with_config is called");
    return ctx && config && config_len ? success : runtime_error;
}

wasi_nn_error load_by_name_with_config(void *ctx, const char *filename, uint32_t filename_len, const char *config,
                                       uint32_t config_len, graph *g)
{
    CHECK(!"the host's load_by_name_with_config is called");
    return ctx && filename && filename_len && config && config_len && g ? success : runtime_error;
}

int main(int argc, char **argv)
{
    void *ctx = NULL;
    graph g;
    CHECK_CODE(success, init_backend(&ctx));
    for (int i = 1; i < argc; i++)
        printf("%d ", (int)load_by_name(ctx, argv[i], (uint32_t)strlen(argv[i]), &g));
    printf("%d\n", (int)load_by_name(ctx, "a\0b", 3, &g));
    CHECK_CODE(success, deinit_backend(ctx));
    return 0;
}
