// ask.c in C++: handles that close themselves, errors as exceptions.
//
// Build: c++ -std=c++17 ask.cpp -o ask $(wasi-nn capi --cflags --libs)
// Run:   ./ask model.gguf "Name the capital city of France."
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>

#include "wasi_nn_llama.h"

namespace {

void check(const char *what, wasi_nn_error code)
{
    if (code == success)
        return;
    std::string reason(1024, '\0');
    auto size = static_cast<std::uint32_t>(reason.size());
    reason.resize(wasi_nn_last_error(nullptr, reason.data(), &size) == success ? size : 0);
    throw std::runtime_error(std::string(what) + ": error " + std::to_string(code) + ": " + reason);
}

class Backend {
public:
    Backend() { check("init_backend", init_backend(&ctx_)); }
    ~Backend() { deinit_backend(ctx_); }
    Backend(const Backend &) = delete;
    Backend &operator=(const Backend &) = delete;

    graph load(const std::string &name, const std::string &config)
    {
        graph model{};
        check("load", load_by_name_with_config(ctx_, name.data(), static_cast<std::uint32_t>(name.size()), config.data(),
                                               static_cast<std::uint32_t>(config.size()), &model));
        return model;
    }

    void *get() const { return ctx_; }

private:
    void *ctx_ = nullptr;
};

class Conversation {
public:
    Conversation(const Backend &backend, graph model) : backend_(backend)
    {
        check("init_execution_context", init_execution_context(backend.get(), model, &context_));
    }
    ~Conversation() { close_execution_context(backend_.get(), context_); }
    Conversation(const Conversation &) = delete;
    Conversation &operator=(const Conversation &) = delete;

    std::string ask(std::string prompt)
    {
        auto n_bytes = static_cast<std::uint32_t>(prompt.size());
        tensor_dimensions dimensions{&n_bytes, 1};
        tensor input{&dimensions, u8, reinterpret_cast<std::uint8_t *>(prompt.data())};
        std::string answer(4096, '\0');
        auto size = static_cast<std::uint32_t>(answer.size());
        auto code = run_inference(backend_.get(), context_, 0, &input, bytes(answer), &size);
        if (code == too_large) { // the answer waits until it fits
            answer.resize(size);
            code = get_output(backend_.get(), context_, 0, bytes(answer), &size);
        }
        check("run_inference", code);
        answer.resize(size);
        return answer;
    }

private:
    static std::uint8_t *bytes(std::string &text) { return reinterpret_cast<std::uint8_t *>(text.data()); }

    const Backend &backend_;
    graph_execution_context context_{};
};

} // namespace

int main(int argc, char **argv)
{
    if (argc < 3) {
        std::cerr << "usage: " << argv[0] << " MODEL PROMPT...\n";
        return 64;
    }
    try {
        Backend backend;
        Conversation conversation(backend, backend.load(argv[1], R"({"temperature": 0, "max_tokens": 256})"));
        for (int i = 2; i < argc; i++)
            std::cout << conversation.ask(argv[i]) << '\n';
    } catch (const std::exception &error) {
        std::cerr << error.what() << '\n';
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
