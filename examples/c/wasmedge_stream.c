/* Prints an answer token by token with the calls that WasmEdge added, then the metadata on stderr.
 *
 * Build: python -m ziglang cc -target wasm32-wasi -O2 -s -o wasmedge_stream.wasm wasmedge_stream.c
 * Run:   wasi-nn run --nn-preload default:GGML:AUTO:MODEL.gguf wasmedge_stream.wasm default "Once upon a time" 64
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wasi_nn.h"

static const char config[] = "{\"temp\": 0, \"ctx-size\": 1024}";

static int fail(const char *call, wasi_nn_error error) {
    fprintf(stderr, "wasmedge_stream: %s failed with WASI-NN error %u\n", call, (unsigned)error);
    return (int)error;
}

/* Prints tokens until the text ends, n_max_tokens are out, or the context is full. */
static wasi_nn_error stream(wasi_nn_context context, long n_max_tokens) {
    char piece[256];
    for (long n_tokens = 0; n_tokens < n_max_tokens; n_tokens++) {
        wasi_nn_error error = wasi_nn_compute_single(context);
        if (error == WASI_NN_END_OF_SEQUENCE) return WASI_NN_SUCCESS;
        if (error) return error;

        uint32_t n_piece_bytes;
        error = wasi_nn_get_output_single(context, WASI_NN_TEXT, piece, sizeof piece, &n_piece_bytes);
        if (error) return error;
        fwrite(piece, 1, n_piece_bytes, stdout);
        fflush(stdout);
    }
    return WASI_NN_SUCCESS;
}

int main(int argc, char **argv) {
    if (argc < 3 || argc > 4) {
        fprintf(stderr, "usage: wasmedge_stream.wasm GRAPH PROMPT [MAX_TOKENS]\n");
        return 64;
    }
    long n_max_tokens = argc == 4 ? strtol(argv[3], NULL, 10) : 128;

    wasi_nn_graph graph;
    wasi_nn_error error = wasi_nn_load_by_name_with_config(argv[1], (uint32_t)strlen(argv[1]), config,
                                                           (uint32_t)strlen(config), &graph);
    if (error) return fail("load_by_name_with_config", error);

    wasi_nn_context context;
    error = wasi_nn_init_execution_context(graph, &context);
    if (error) return fail("init_execution_context", error);

    /* Programs in the field pass one dimension of 1 whatever the length; the length that counts is the data's. */
    static const uint32_t dimensions[] = {1};
    wasi_nn_tensor prompt = {dimensions, 1, WASI_NN_TYPE_U8, argv[2], (uint32_t)strlen(argv[2])};
    error = wasi_nn_set_input(context, WASI_NN_PROMPT, &prompt);
    if (error) return fail("set_input", error);

    wasi_nn_error streamed = stream(context, n_max_tokens);
    putchar('\n');
    fflush(stdout);

    char metadata[512];
    uint32_t n_metadata_bytes;
    error = wasi_nn_get_output_single(context, WASI_NN_METADATA, metadata, sizeof metadata, &n_metadata_bytes);
    if (error) return fail("get_output_single", error);
    fprintf(stderr, "%.*s\n", (int)n_metadata_bytes, metadata);

    if ((error = wasi_nn_fini_single(context))) return fail("fini_single", error);
    if ((error = wasi_nn_finalize_execution_context(context))) return fail("finalize_execution_context", error);
    if ((error = wasi_nn_unload(graph))) return fail("unload", error);
    return streamed ? fail("compute_single", streamed) : 0;
}
