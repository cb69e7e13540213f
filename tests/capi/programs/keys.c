/* Configurations, one a line of standard input: each is loaded with a model, and one prompt is answered under it.
 * Prints a line of JSON a configuration: {"load": CODE, "compute": CODE, "text": HEX, "metadata": {...}, "error": HEX}.
 * Usage: keys MODEL PROMPT. */
#include "check.h"

enum { N_LINE_BYTES = 1 << 16 };

static void print_hex(const char *name, const char *text)
{
    printf(", \"%s\": \"", name);
    for (; *text; text++)
        printf("%02x", (unsigned char)*text);
    printf("\"");
}

static void answer(void *ctx, graph g, char *prompt)
{
    static char text[1 << 16];
    graph_execution_context context;
    uint32_t size = sizeof text;
    tensor input = {NULL, u8, (uint8_t *)prompt};
    CHECK_CODE(success, init_execution_context(ctx, g, &context));
    CHECK_CODE(success, set_input(ctx, context, 0, &input));
    int code = (int)compute(ctx, context);
    printf(", \"compute\": %d", code);
    if (code != success)
        print_hex("error", last_error());
    CHECK_CODE(success, get_output(ctx, context, 0, (uint8_t *)text, &size));
    print_hex("text", text);
    size = sizeof text;
    CHECK_CODE(success, get_output(ctx, context, 1, (uint8_t *)text, &size));
    printf(", \"metadata\": %s", text);
    CHECK_CODE(success, close_execution_context(ctx, context));
}

int main(int argc, char **argv)
{
    static char line[N_LINE_BYTES];
    void *ctx = NULL;
    CHECK(argc == 3);
    CHECK_CODE(success, init_backend(&ctx));
    while (fgets(line, sizeof line, stdin)) {
        graph g;
        uint32_t n_bytes = (uint32_t)strcspn(line, "\n");
        int code = (int)load_by_name_with_config(ctx, argv[1], (uint32_t)strlen(argv[1]), line, n_bytes, &g);
        printf("{\"load\": %d", code);
        if (code == success) {
            answer(ctx, g, argv[2]);
            CHECK_CODE(success, unload(ctx, g));
        } else {
            print_hex("error", last_error());
        }
        puts("}");
    }
    CHECK_CODE(success, deinit_backend(ctx));
    return 0;
}
