%% @doc The functions of `c_src/wasi_nn_nif.c': one call of the C library each.
%%
%% All but {@link cancel/1} run on dirty IO schedulers, since they wait. What they return is closed when nobody refers
%% to it any more.
-module(wasi_nn_nif).

-export([open/1, deinit/1, load/3, unload/1, context/2, close/1, cancel/1]).
-export([set_input/3, compute/1, get_output/2, run_inference/3, compute_single/2]).
-export_type([backend/0, graph/0, context/0, failure/0]).

-nifs([open/1, deinit/1, load/3, unload/1, context/2, close/1, cancel/1]).
-nifs([set_input/3, compute/1, get_output/2, run_inference/3, compute_single/2]).
-on_load(on_load/0).

-include_lib("kernel/include/logger.hrl").

-opaque backend() :: reference().
-opaque graph() :: reference().
-opaque context() :: reference().
%% The number is one of `wasi_nn_llama.h'.
-type failure() :: {error, integer(), binary()}.

on_load() ->
    Path = filename:join(code:priv_dir(wasi_nn), ?MODULE_STRING),
    case erlang:load_nif(Path, 0) of
        ok ->
            ok;
        {error, {_Kind, Text}} ->
            ?LOG_ERROR("wasi_nn: the NIF cannot be loaded: ~ts", [Text]),
            error
    end.

-spec open(binary()) -> {ok, backend()} | failure().
open(_Config) -> erlang:nif_error(not_loaded).

%% @doc Of a backend, or of the one that a graph has for itself.
-spec deinit(backend() | graph()) -> {ok, done} | failure().
deinit(_Backend) -> erlang:nif_error(not_loaded).

-spec load(binary(), binary(), binary()) -> {ok, graph()} | failure().
load(_BackendConfig, _Name, _Config) -> erlang:nif_error(not_loaded).

-spec unload(graph()) -> {ok, done} | failure().
unload(_Graph) -> erlang:nif_error(not_loaded).

%% @doc A context of its own for an empty id, else the session of that name, which is closed as often as it was opened.
%% Also the library's number of it on this graph: equal for all that share a live session.
-spec context(graph(), binary()) -> {ok, {context(), non_neg_integer()}} | failure().
context(_Graph, _SessionId) -> erlang:nif_error(not_loaded).

-spec close(context()) -> {ok, done} | failure().
close(_Context) -> erlang:nif_error(not_loaded).

-spec cancel(context()) -> ok.
cancel(_Context) -> erlang:nif_error(not_loaded).

-spec set_input(context(), 0 | 1, binary()) -> {ok, done} | failure().
set_input(_Context, _Index, _Data) -> erlang:nif_error(not_loaded).

-spec compute(context()) -> {ok, done} | failure().
compute(_Context) -> erlang:nif_error(not_loaded).

-spec get_output(context(), 0 | 1) -> {ok, binary()} | failure().
get_output(_Context, _Index) -> erlang:nif_error(not_loaded).

-spec run_inference(context(), binary(), binary()) -> {ok, binary()} | failure().
run_inference(_Context, _Prompt, _Config) -> erlang:nif_error(not_loaded).

%% @doc The next token's text, perhaps empty; `done' after the last one.
-spec compute_single(context(), binary()) -> {ok, binary()} | done | failure().
compute_single(_Context, _Config) -> erlang:nif_error(not_loaded).
