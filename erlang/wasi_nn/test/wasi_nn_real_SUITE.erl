%% Fifty processes chat at once with SmolLM2, over each transport, while the node's schedulers are watched.
-module(wasi_nn_real_SUITE).
-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-define(TICK_MS, 10).
-define(N_IDLE_TICKS, 100).

suite() ->
    [{timetrap, {minutes, 10}}].

all() ->
    [{group, port}, {group, nif}].

groups() ->
    [{Transport, [], [fifty_processes_chat]} || Transport <- [port, nif]].

init_per_group(Transport, Config) ->
    ok = wasi_nn_test:start(Transport, [{port_args, ["port", "--nice", "10"]}]),
    [{transport, Transport} | Config].

end_per_group(_Transport, _Config) ->
    wasi_nn_test:stop().

names() ->
    string:lexemes(
        "Ada Alan Alice Anna Arthur Ben Bob Carl Clara David Diana Edgar Edith Emma Eric Eva Felix Frank Fred George "
        "Grace Hannah Harry Helen Henry Ida Iris Ivan Jack James Jane John Julia Karl Kate Laura Leo Linda Lucy Mark "
        "Martha Mary Max Nina Nora Oscar Otto Paul Peter Rosa",
        " "
    ).

%% The model has 135 million parameters: it is held to saying some name, and has to choose among fifty.
config() ->
    Names = lists:join(" | ", [["\"", Name, "\""] || Name <- names()]),
    Grammar = ["root ::= \"My name is \" (", Names, ") \".\""],
    #{
        temperature => 0,
        repeat_penalty => 1.0,
        max_tokens => 12,
        n_ctx => 256,
        max_concurrent => 16,
        default_task_timeout_ms => 0,
        grammar => iolist_to_binary(Grammar)
    }.

fifty_processes_chat(Config) ->
    {Idle, _} = with_ticker(fun() ->
        receive
        after ?N_IDLE_TICKS * ?TICK_MS -> ok
        end
    end),
    {ok, Backend} = wasi_nn:init_backend(config()),
    {ok, Model} = wasi_nn:load_by_name(Backend, "smollm2"),
    StartMs = erlang:monotonic_time(millisecond),
    {Busy, Chats} = with_ticker(fun() -> chat_all(Backend, Model) end),
    DurationS = (erlang:monotonic_time(millisecond) - StartMs) / 1000,
    io:format(user, "~n~s: 50 x 3 turns in ~.1f s; ticks of ~b ms are late by ~s; idle ~s~n", [
        ?config(transport, Config), DurationS, ?TICK_MS, lateness(Busy), lateness(Idle)
    ]),
    Forgetful = [{Name, Answers} || {Name, [_First | Later] = Answers} <- Chats, not remembers(Name, Later)],
    ?assertEqual([], Forgetful),
    %% A machine that also does something else is late by itself, and the most so once in a while.
    ?assert(at(0.95, Busy) < max(250, 5 * at(0.95, Idle))).

lateness(LateMs) ->
    io_lib:format("~.1f ms at most, ~.1f ms in 99 of 100", [at(1, LateMs), at(0.99, LateMs)]).

%% The lateness that this part of the ticks does not exceed.
at(Part, LateMs) ->
    lists:nth(max(1, round(Part * length(LateMs))), lists:sort(LateMs)).

remembers(Name, Answers) ->
    lists:all(fun(Answer) -> Answer =:= iolist_to_binary(["My name is ", Name, "."]) end, Answers).

chat_all(Backend, Model) ->
    Parent = self(),
    Chatting = [spawn_link(fun() -> Parent ! {self(), chat(Name, Backend, Model)} end) || Name <- names()],
    [receive {Pid, Chat} -> Chat end || Pid <- Chatting].

%% Only the first message has the name.
chat(Name, Backend, Model) ->
    {ok, Context} = wasi_nn:init_execution_context(Backend, Model),
    Messages = ["Repeat: My name is " ++ Name ++ ".", "Repeat it.", "Repeat it again."],
    {Name, [answer(wasi_nn:run_inference(Backend, Context, Message)) || Message <- Messages]}.

answer({ok, Text}) -> Text.

%% How late each tick came while something was done, in ms.
with_ticker(Work) ->
    Parent = self(),
    Ticker = spawn_link(fun() -> Parent ! {late_ms, tick(erlang:monotonic_time(millisecond), [])} end),
    Result = Work(),
    Ticker ! stop,
    receive
        {late_ms, LateMs} -> {LateMs, Result}
    end.

tick(LastMs, LateMs) ->
    NextMs = LastMs + ?TICK_MS,
    Timer = erlang:start_timer(NextMs, self(), tick, [{abs, true}]),
    receive
        {timeout, Timer, tick} ->
            NowMs = erlang:monotonic_time(microsecond) / 1000,
            tick(max(NextMs, trunc(NowMs)), [NowMs - NextMs | LateMs]);
        stop ->
            LateMs
    end.
