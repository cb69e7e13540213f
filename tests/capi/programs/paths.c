/* Loads each name as a guest of WAMR would, and one with a NUL inside. Usage: paths NAME... Prints the codes. */
#include "check.h"

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
