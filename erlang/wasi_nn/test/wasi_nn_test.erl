%% What the suites share.
-module(wasi_nn_test).

-export([start/2, stop/0, tiny_model/0, config/0, wait_until/2, collect/1, first_token/1, endless/0, os_pid/1, is_alive/1]).

%% Start the application anew under this transport and environment.
start(Transport, Environment) ->
    stop(),
    ok = application:load(wasi_nn),
    ok = application:set_env(wasi_nn, transport, Transport),
    %% Tests do not give way to each other.
    ok = application:set_env(wasi_nn, port_args, ["port"]),
    _ = [ok = application:set_env(wasi_nn, Key, Value) || {Key, Value} <- Environment],
    {ok, _} = application:ensure_all_started(wasi_nn),
    ok.

stop() ->
    _ = application:stop(wasi_nn),
    _ = application:unload(wasi_nn),
    ok.

%% A model with random weights, in full precision: its texts do not depend on who shares a batch.
tiny_model() ->
    case os:getenv("WASI_NN_TINY_MODEL") of
        false -> error("set WASI_NN_TINY_MODEL: scripts/erlang_test does");
        Path -> Path
    end.

config() ->
    #{
        temperature => 0,
        max_tokens => 16,
        n_ctx => 512,
        cache_type_k => f32,
        cache_type_v => f32,
        default_task_timeout_ms => 0
    }.

%% For a call: it does not end by itself.
endless() ->
    #{max_tokens => 1000000, ignore_eos => true, context_shifting => true}.

%% Fails after a time that no machine needs.
wait_until(What, Condition) ->
    wait_until(What, Condition, erlang:monotonic_time(millisecond) + 60000).

wait_until(What, Condition, DeadlineMs) ->
    case Condition() of
        true ->
            ok;
        false ->
            erlang:monotonic_time(millisecond) < DeadlineMs orelse error({never, What}),
            receive
            after 10 -> wait_until(What, Condition, DeadlineMs)
            end
    end.

%% The tokens of a stream and its last message.
collect(Stream) ->
    collect(Stream, []).

collect(Stream, Tokens) ->
    receive
        {wasi_nn, Stream, {token, Token}} -> collect(Stream, [Token | Tokens]);
        {wasi_nn, Stream, End} -> {lists:reverse(Tokens), End}
    after 60000 -> error({stream_hangs, lists:reverse(Tokens)})
    end.

first_token(Stream) ->
    receive
        {wasi_nn, Stream, Event} -> {token, Token} = Event, Token
    after 60000 -> error(no_token)
    end.

os_pid(Backend) ->
    {ok, #{os_pid := OsPid}} = wasi_nn:status(Backend),
    OsPid.

is_alive(OsPid) ->
    os:cmd("kill -0 " ++ integer_to_list(OsPid) ++ " 2>&1") =:= "".
