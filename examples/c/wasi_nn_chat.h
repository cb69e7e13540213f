/* A conversation with a language model in three lines, over the calls of wasi_nn.h:
 *
 *     wasi_nn_chat chat = wasi_nn_chat_open("default", NULL);
 *     puts(wasi_nn_chat_ask(&chat, "My name is Alice."));
 *     puts(wasi_nn_chat_ask(&chat, "What is my name?"));
 *
 * The host remembers what was said. chat.error is 0, or the number (WASI_NN_*) of what failed last; an answer is "" then,
 * or as far as it came when the context was full. A chat that could not be opened stays at its error.
 *
 * Imports the official witx functions only, until wasi_nn_chat_close is called, which needs WasmEdge's two.
 */
#ifndef WASI_NN_CHAT_H
#define WASI_NN_CHAT_H

#include <stdlib.h>
#include <string.h>

#include "wasi_nn.h"

typedef struct {
    wasi_nn_graph graph;
    wasi_nn_context context;
    wasi_nn_error error;
    int is_open;
    char *answer; /* of the last question; NULL before the first */
    uint32_t n_answer_bytes_max;
} wasi_nn_chat;

static inline wasi_nn_error wasi_nn_chat_set(wasi_nn_chat *chat, uint32_t index, const char *text) {
    static const uint32_t dimensions[] = {1};
    wasi_nn_tensor tensor = {dimensions, 1, WASI_NN_TYPE_U8, text, (uint32_t)strlen(text)};
    return wasi_nn_set_input(chat->context, index, &tensor);
}

/* config is JSON for this conversation ("{\"temperature\": 0}"), or NULL. */
static inline wasi_nn_chat wasi_nn_chat_open(const char *graph, const char *config) {
    wasi_nn_chat chat = {0};
    chat.error = wasi_nn_load_by_name(graph, (uint32_t)strlen(graph), &chat.graph);
    if (!chat.error) chat.error = wasi_nn_init_execution_context(chat.graph, &chat.context);
    if (!chat.error) chat.error = wasi_nn_chat_set(&chat, WASI_NN_CONFIG, "{\"prompt_mode\": \"chat\"}");
    if (!chat.error && config) chat.error = wasi_nn_chat_set(&chat, WASI_NN_CONFIG, config);
    chat.is_open = !chat.error;
    return chat;
}

/* Makes the answer's buffer large enough for n_bytes and a NUL. */
static inline wasi_nn_error wasi_nn_chat_reserve(wasi_nn_chat *chat, uint32_t n_bytes) {
    if (chat->answer && n_bytes <= chat->n_answer_bytes_max) return WASI_NN_SUCCESS;
    char *larger = realloc(chat->answer, (size_t)n_bytes + 1);
    if (!larger) return WASI_NN_MISSING_MEMORY;
    chat->answer = larger;
    chat->n_answer_bytes_max = n_bytes;
    return WASI_NN_SUCCESS;
}

/* The answer to one turn, NUL-terminated. It is the chat's own and lives until the next question. */
static inline const char *wasi_nn_chat_ask(wasi_nn_chat *chat, const char *question) {
    if (!chat->is_open) return "";
    chat->error = wasi_nn_chat_set(chat, WASI_NN_PROMPT, question);
    if (chat->error) return "";
    wasi_nn_error computed = wasi_nn_compute(chat->context);
    if (computed && computed != WASI_NN_CONTEXT_FULL) {
        chat->error = computed;
        return "";
    }
    uint32_t n_bytes = 1024;
    do { /* too large: n_bytes is the size that it takes, so the second time is the last */
        chat->error = wasi_nn_chat_reserve(chat, n_bytes);
        if (chat->error) return "";
        chat->error =
            wasi_nn_get_output(chat->context, WASI_NN_TEXT, chat->answer, chat->n_answer_bytes_max, &n_bytes);
    } while (chat->error == WASI_NN_TOO_LARGE);
    if (chat->error) return "";
    chat->answer[n_bytes] = '\0';
    chat->error = computed;
    return chat->answer;
}

/* Gives everything back; what was answered is gone. */
static inline void wasi_nn_chat_close(wasi_nn_chat *chat) {
    if (chat->is_open) {
        wasi_nn_finalize_execution_context(chat->context);
        wasi_nn_unload(chat->graph);
    }
    free(chat->answer);
    *chat = (wasi_nn_chat){0};
}

#endif
