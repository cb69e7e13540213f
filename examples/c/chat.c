/* A conversation: asks each question in turn and prints the answers. The model knows what was said before.
 *
 * Build: python -m ziglang cc -target wasm32-wasi -O2 -s -o chat.wasm chat.c
 * Run:   wasi-nn run --nn-graph default=smollm2,temperature=0 chat.wasm default "Name the capital city of France." "And of Italy?"
 */
#include <stdio.h>

#include "wasi_nn_chat.h"

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: chat.wasm GRAPH QUESTION...\n");
        return 64;
    }
    wasi_nn_chat chat = wasi_nn_chat_open(argv[1], NULL);
    for (int i = 2; i < argc && !chat.error; i++) puts(wasi_nn_chat_ask(&chat, argv[i]));
    if (chat.error) fprintf(stderr, "chat: WASI-NN error %u\n", (unsigned)chat.error);
    return (int)chat.error;
}
