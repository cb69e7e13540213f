/* A program that never sets the size of its buffer, never looks at the graph's number, and sends neither dimensions nor
 * the type of text. Usage: careless MODEL. Prints the code and the size that come back. */
#include "check.h"

int main(int argc, char **argv)
{
    static uint8_t text[8192];
    static const char config[] = "{\"max_tokens\": 24, \"temperature\": 0, \"n_ctx\": 256}";
    void *ctx = NULL;
    graph ignored;
    graph_execution_context context;
    uint32_t size = 0;
    tensor_dimensions none = {NULL, 0};
    tensor input = {&none, fp32, (uint8_t *)"hello"};
    CHECK(argc == 2);
    CHECK_CODE(success, init_backend(&ctx));
    CHECK_CODE(success, load_by_name_with_config(ctx, argv[1], (uint32_t)strlen(argv[1]), config, sizeof config - 1, &ignored));
    CHECK_CODE(success, init_execution_context(ctx, 0, &context));
    int code = (int)run_inference(ctx, context, 0, &input, text, &size);
    printf("%d %u\n", code, size);
    CHECK(strlen((char *)text) == (code == success ? size : 0));
    CHECK_CODE(success, deinit_backend(ctx));
    return 0;
}
