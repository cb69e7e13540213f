/* Prints an answer as it is generated, token by token. Ctrl-C stops the answer, not the program.
 *
 * Build: cc stream.c -o stream $(wasi-nn capi --cflags --libs)
 * Run:   ./stream model.gguf "Once upon a time"
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wasi_nn_llama.h"

static volatile sig_atomic_t is_interrupted;

static void interrupt(int number)
{
    (void)number;
    is_interrupted = 1;
}

static int failed(const char *what, wasi_nn_error code)
{
    char reason[1024];
    uint32_t size = sizeof reason;
    if (wasi_nn_last_error(NULL, reason, &size) != success)
        size = 0;
    fprintf(stderr, "%s: error %d: %.*s\n", what, (int)code, (int)size, reason);
    return EXIT_FAILURE;
}

static wasi_nn_error print_pieces(void *backend, graph_execution_context context)
{
    uint8_t piece[256]; /* a token is a few bytes; nothing comes while a character is incomplete */
    wasi_nn_error code = success;
    while (!is_interrupted && (code = compute_single(backend, context)) == success) {
        uint32_t size = sizeof piece;
        code = get_output_single(backend, context, 0, piece, &size);
        if (code != success)
            return code;
        fwrite(piece, 1, size, stdout);
        fflush(stdout);
    }
    return code == end_of_sequence ? success : code;
}

int main(int argc, char **argv)
{
    static const char config[] = "{\"max_tokens\": 256, \"temperature\": 0}";
    void *backend = NULL;
    graph model;
    graph_execution_context context;
    if (argc != 3) {
        fprintf(stderr, "usage: %s MODEL PROMPT\n", argv[0]);
        return 64;
    }
    tensor input = {NULL, u8, (uint8_t *)argv[2]}; /* without dimensions the text ends at its NUL */
    signal(SIGINT, interrupt);
    const char *step = "init_backend";
    wasi_nn_error code = init_backend(&backend);
    if (code == success) {
        step = "load_by_name_with_config";
        code = load_by_name_with_config(backend, argv[1], (uint32_t)strlen(argv[1]), config, sizeof config - 1, &model);
    }
    if (code == success) {
        step = "init_execution_context";
        code = init_execution_context(backend, model, &context);
    }
    if (code == success) {
        step = "set_input";
        code = set_input(backend, context, 0, &input);
    }
    if (code == success) {
        step = "compute_single";
        code = print_pieces(backend, context);
        putchar('\n');
    }
    int status = code == success ? EXIT_SUCCESS : failed(step, code);
    if (backend != NULL)
        deinit_backend(backend);
    return status;
}
