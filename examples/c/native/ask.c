/* Asks a model one question and prints the answer.
 *
 * Build: cc ask.c -o ask $(wasi-nn capi --cflags --libs)
 * Run:   ./ask model.gguf "Name the capital city of France."
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wasi_nn_llama.h"

static const char CONFIG[] = "{\"model\": {\"n_ctx\": 2048}, \"sampling\": {\"temperature\": 0},"
                             " \"stopping\": {\"max_tokens\": 256}}";

/* The status of a failed call, with the library's reason. */
static int failed(void *backend, const char *what, wasi_nn_error code)
{
    char reason[1024];
    uint32_t size = sizeof reason;
    if (wasi_nn_last_error(backend, reason, &size) != success)
        size = 0;
    fprintf(stderr, "%s: error %d: %.*s\n", what, (int)code, (int)size, reason);
    return EXIT_FAILURE;
}

static int ask(void *backend, graph_execution_context context, char *prompt)
{
    uint32_t n_prompt_bytes = (uint32_t)strlen(prompt);
    tensor_dimensions dimensions = {&n_prompt_bytes, 1};
    tensor input = {&dimensions, u8, (uint8_t *)prompt};
    wasi_nn_error code = set_input(backend, context, 0, &input);
    if (code != success)
        return failed(backend, "set_input", code);
    code = compute(backend, context);
    if (code != success)
        return failed(backend, "compute", code);

    /* The answer's length is not known before: take a buffer of some size, and a larger one if that is too small. */
    uint32_t size = 4096;
    uint8_t *answer = malloc(size);
    if (answer == NULL)
        return EXIT_FAILURE;
    while ((code = get_output(backend, context, 0, answer, &size)) == too_large) {
        uint8_t *larger = realloc(answer, size);
        if (larger == NULL)
            break;
        answer = larger;
    }
    if (code == success)
        printf("%.*s\n", (int)size, (char *)answer);
    free(answer);
    return code == success ? EXIT_SUCCESS : failed(backend, "get_output", code);
}

int main(int argc, char **argv)
{
    void *backend = NULL;
    graph model;
    graph_execution_context context;
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL PROMPT...\n", argv[0]);
        return 64;
    }
    wasi_nn_error code = init_backend(&backend);
    if (code != success)
        return failed(NULL, "init_backend", code);
    code = load_by_name_with_config(backend, argv[1], (uint32_t)strlen(argv[1]), CONFIG, sizeof CONFIG - 1, &model);
    int status = code == success ? EXIT_SUCCESS : failed(backend, "load_by_name_with_config", code);
    if (code == success) {
        code = init_execution_context(backend, model, &context);
        status = code == success ? EXIT_SUCCESS : failed(backend, "init_execution_context", code);
    }
    if (code == success) {
        /* One context is one conversation: each prompt is a turn, and the model remembers the turns before. */
        for (int i = 2; i < argc && status == EXIT_SUCCESS; i++)
            status = ask(backend, context, argv[i]);
        close_execution_context(backend, context);
    }
    deinit_backend(backend); /* what was loaded goes with it */
    return status;
}
