%% @doc One for the node: owns the transport, knows who has what open, and opens it again when the other side is
%% replaced. Nothing in here waits for the other side.
-module(wasi_nn_server).
-behaviour(gen_server).

-export([start_link/0, call/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).
-export_type([request/0]).

-include_lib("kernel/include/logger.hrl").

%% A cancel that reaches the other side before its run has begun has no effect, so it is repeated.
-define(CANCEL_AGAIN_MS, 50).
%% Who stays up for so long is not in a circle of crashes.
-define(STABLE_MS, 10000).

-type id() :: wasi_nn_transport:id().
-type request() ::
    {init_backend, binary()}
    | {deinit_backend | status | latest_graph, id()}
    | {load_by_name, id(), binary(), binary()}
    | {unload, id(), id()}
    | {init_execution_context, id(), id(), binary()}
    | {set_input, id(), id(), 0 | 1, binary()}
    | {get_output, id(), id(), 0 | 1}
    | {compute | close_execution_context, id(), id()}
    | {run_inference | stream, id(), id(), binary(), binary()}
    | {cancel, reference() | id()}.

-record(state, {
    transport :: module(),
    options :: wasi_nn_transport:options(),
    other_side :: term(),
    phase = waiting :: waiting | starting | {restoring, wasi_nn_books:stage(), #{id() => []}} | up,
    %% Why calls are refused while it is not up; undefined: they may wait.
    trouble :: wasi_nn:reason() | undefined,
    books = wasi_nn_books:new() :: wasi_nn_books:books(),
    calls = wasi_nn_calls:new() :: wasi_nn_calls:calls(),
    held = queue:new() :: queue:queue({request(), gen_server:from() | none}),
    n_starts = 0 :: non_neg_integer(),
    n_failures = 0 :: non_neg_integer(),
    up_since_ms :: integer() | undefined
}).

-spec start_link() -> {ok, pid()} | {error, term()} | ignore.
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% @doc Ask the server; waits as long as it takes.
-spec call(request()) -> {ok, term()} | {error, wasi_nn:reason()}.
call(Request) ->
    try
        gen_server:call(?MODULE, Request, infinity)
    catch
        exit:{noproc, _} ->
            {error, {runtime_error, <<"wasi_nn does not run: application:ensure_all_started(wasi_nn)">>}};
        exit:{_Reason, {gen_server, call, _}} ->
            {error, {restarted, <<"wasi_nn was stopped or started again: open a backend anew">>}}
    end.

%% -- gen_server ----------------------------------------------------------------------------------------------------

-spec init([]) -> {ok, #state{}} | {stop, term()}.
init([]) ->
    process_flag(trap_exit, true),
    Options = maps:from_list(application:get_all_env(wasi_nn)),
    case wasi_nn_transport:module(maps:get(transport, Options, port)) of
        {ok, Transport} ->
            {ok, start_other_side(#state{transport = Transport, options = Options})};
        {error, Message} ->
            {stop, Message}
    end.

-spec handle_call(request(), gen_server:from(), #state{}) -> {noreply, #state{}}.
handle_call({cancel, Target}, From, State) ->
    {Answer, NewState} = cancel_target(Target, State),
    gen_server:reply(From, {ok, Answer}),
    {noreply, NewState};
handle_call({latest_graph, Backend}, From, #state{books = Books} = State) ->
    case wasi_nn_books:latest_graph(Backend, Books) of
        {ok, Graph} -> gen_server:reply(From, {ok, Graph});
        error -> gen_server:reply(From, {error, {not_found, <<"no model is loaded: load one first">>}})
    end,
    {noreply, State};
handle_call({status, _Backend}, From, #state{phase = Phase} = State) when Phase =/= up ->
    gen_server:reply(From, {ok, status(State)}),
    {noreply, State};
handle_call(Request, From, #state{phase = up} = State) ->
    {noreply, perform(Request, From, State)};
handle_call(Request, From, #state{trouble = undefined} = State) ->
    {noreply, hold(Request, From, State)};
handle_call(_Request, From, #state{trouble = Trouble} = State) ->
    gen_server:reply(From, {error, Trouble}),
    {noreply, State}.

-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast(_Message, State) ->
    {noreply, State}.

-spec handle_info(term(), #state{}) -> {noreply, #state{}}.
handle_info({'DOWN', Monitor, process, _Pid, _Reason} = Message, #state{calls = Calls} = State) ->
    case wasi_nn_calls:died(Monitor, Calls) of
        {call, Id, Rest} -> {noreply, cancel(Id, State#state{calls = Rest})};
        {context, Context, Rest} -> {noreply, owner_died(Context, State#state{calls = Rest})};
        unknown -> {noreply, of_transport(Message, State)}
    end;
handle_info({timeout, _Timer, {wasi_nn_server, start}}, State) ->
    {noreply, start_other_side(State)};
handle_info({timeout, _Timer, {wasi_nn_server, cancel, Id}}, State) ->
    {noreply, send_cancel(Id, State)};
handle_info(Message, State) ->
    {noreply, of_transport(Message, State)}.

of_transport(_Message, #state{phase = waiting} = State) ->
    State;
of_transport(Message, #state{transport = Transport, other_side = OtherSide} = State) ->
    case Transport:handle_info(Message, OtherSide) of
        {Events, NewSide} -> lists:foldl(fun event/2, State#state{other_side = NewSide}, Events);
        unknown -> State
    end.

-spec terminate(term(), #state{}) -> ok.
terminate(_Reason, #state{phase = waiting}) ->
    ok;
terminate(_Reason, #state{transport = Transport, other_side = OtherSide}) ->
    Transport:stop(OtherSide).

%% -- Starting, and starting again ----------------------------------------------------------------------------------

start_other_side(#state{transport = Transport, options = Options, n_starts = NStarts} = State) ->
    case Transport:start(Options) of
        {ok, OtherSide} ->
            State#state{phase = starting, other_side = OtherSide, n_starts = NStarts + 1};
        {error, Message} ->
            ?LOG_ERROR("wasi_nn: ~ts", [Message]),
            start_later(refuse({runtime_error, Message}, State))
    end.

start_later(#state{n_failures = NFailures, options = Options} = State) ->
    #{restart_delay_min_ms := Min, restart_delay_max_ms := Max} = Options,
    Delay = min(Max, Min * (1 bsl min(NFailures, 20))),
    _ = erlang:start_timer(Delay, self(), {wasi_nn_server, start}),
    State#state{phase = waiting, n_failures = NFailures + 1, up_since_ms = undefined, other_side = undefined}.

%% Those who wait would wait for something that does not come back soon.
refuse(Reason, #state{held = Held} = State) ->
    _ = [gen_server:reply(From, {error, Reason}) || {_Request, From} <- queue:to_list(Held), From =/= none],
    Internal = queue:filter(fun({_Request, From}) -> From =:= none end, Held),
    State#state{trouble = Reason, held = Internal}.

other_side_is_gone(Message, #state{calls = Calls, books = Books} = State) ->
    ?LOG_ERROR("wasi_nn: ~ts; it is started again", [Message]),
    Reason = {restarted, <<Message/binary, " while this call ran, and is started again: try again">>},
    {UnderWay, NoCalls} = wasi_nn_calls:take_all(Calls),
    ok = lists:foreach(fun(Call) -> wasi_nn_calls:answer(Call, {error, Reason}) end, UnderWay),
    Stable = forgive(State#state{calls = NoCalls, books = wasi_nn_books:replaced(Books)}),
    case Stable#state.n_failures of
        0 -> start_later(Stable#state{trouble = undefined});
        _ -> start_later(refuse({restarted, <<Message/binary, ", again; try later">>}, Stable))
    end.

forgive(#state{up_since_ms = UpSince} = State) ->
    case UpSince =/= undefined andalso erlang:monotonic_time(millisecond) - UpSince >= ?STABLE_MS of
        true -> State#state{n_failures = 0};
        false -> State
    end.

restore(Stage, #state{books = Books} = State) ->
    Requests = wasi_nn_books:to_restore(Stage, Books),
    Pending = maps:from_list([{Id, []} || {Id, _Operation, _Arguments} <- Requests]),
    Restoring = State#state{phase = {restoring, Stage, Pending}},
    lists:foldl(
        fun({Id, Operation, Arguments}, Acc) ->
            send(new_id(), call(Operation, Arguments, {restore, Id}), Acc)
        end,
        next_stage(Restoring),
        Requests
    ).

next_stage(#state{phase = {restoring, backends, Pending}} = State) when map_size(Pending) =:= 0 ->
    restore(graphs, State);
next_stage(#state{phase = {restoring, graphs, Pending}} = State) when map_size(Pending) =:= 0 ->
    restore(contexts, State);
next_stage(#state{phase = {restoring, contexts, Pending}, held = Held} = State) when map_size(Pending) =:= 0 ->
    Up = State#state{
        phase = up, trouble = undefined, held = queue:new(), up_since_ms = erlang:monotonic_time(millisecond)
    },
    lists:foldl(fun({Request, From}, Acc) -> perform(Request, From, Acc) end, Up, queue:to_list(Held));
next_stage(State) ->
    State.

restored(Id, Result, #state{phase = {restoring, Stage, Pending}} = State) ->
    Noted = note_restored(Stage, Id, Result, State),
    next_stage(Noted#state{phase = {restoring, Stage, maps:remove(Id, Pending)}}).

note_restored(contexts, Id, {ok, IsSaved}, #state{books = Books} = State) ->
    State#state{books = wasi_nn_books:saved(Id, IsSaved =:= true, Books)};
note_restored(_Stage, _Id, {ok, _Done}, State) ->
    State;
note_restored(Stage, Id, {error, {Code, Message}}, #state{books = Books} = State) ->
    ?LOG_ERROR("wasi_nn: one of the ~s could not be opened again (~s): ~ts", [Stage, Code, Message]),
    case Stage of
        backends -> State#state{books = element(2, wasi_nn_books:remove_backend(Id, Books))};
        graphs -> State#state{books = wasi_nn_books:remove_graph(Id, Books)};
        contexts -> forget_context(Id, State)
    end.

%% -- Events --------------------------------------------------------------------------------------------------------

event(_Event, #state{phase = waiting} = State) ->
    State;
event(ready, State) ->
    restore(backends, State);
event({down, Message}, State) ->
    other_side_is_gone(Message, State);
event({token, Id, Text}, #state{calls = Calls} = State) ->
    ok = wasi_nn_calls:token(Id, Text, Calls),
    State;
event({reply, Id, Reply}, #state{calls = Calls} = State) ->
    Result = wasi_nn_calls:result(Id, Reply, Calls),
    case wasi_nn_calls:take(Id, Calls) of
        {#{caller := {restore, Restored}}, Rest} ->
            restored(Restored, Result, State#state{calls = Rest});
        {Call, Rest} ->
            {Answer, Noted} = note(Call, Result, leave(Id, Call, State#state{calls = Rest})),
            ok = wasi_nn_calls:answer(Call, Answer),
            Noted;
        error ->
            State
    end.

leave(_Id, #{context := none}, State) ->
    State;
leave(Id, #{context := Context, operation := Operation}, #state{books = Books} = State) ->
    State#state{books = wasi_nn_books:leave(Context, Id, Operation, Books)}.

%% What a result changes in the books, and what the caller gets.
note(#{operation := init_backend, arguments := [Id, _Config], caller := none}, {ok, _}, State) ->
    {{ok, done}, send_internal(deinit_backend, [Id], State)};
note(#{operation := init_backend, arguments := [Id, Config]}, {ok, _}, #state{books = Books} = State) ->
    {{ok, Id}, State#state{books = wasi_nn_books:add_backend(Id, Config, Books)}};
note(#{operation := load_by_name, arguments := [Backend, Id, Name, Config], caller := Caller}, {ok, _}, State) ->
    #state{books = Books} = State,
    case Caller =/= none andalso wasi_nn_books:has_backend(Backend, Books) of
        true -> {{ok, Id}, State#state{books = wasi_nn_books:add_graph(Id, Backend, Name, Config, Books)}};
        false -> {closed_meanwhile(), send_internal(unload, [Id], State)}
    end;
note(#{operation := init_execution_context, arguments := Arguments, caller := Caller}, {ok, IsSaved}, State) ->
    [Graph, Id, SessionId] = Arguments,
    case {Caller, wasi_nn_books:has_graph(Graph, State#state.books)} of
        {{call, {Owner, _Tag}}, true} ->
            {{ok, Id}, add_context(Id, Graph, SessionId, Owner, IsSaved =:= true, State)};
        _NobodyWantsIt ->
            {closed_meanwhile(), send_internal(close_execution_context, [Id], State)}
    end;
note(#{operation := stream}, {ok, Json}, State) ->
    {{ok, decoded(Json)}, State};
note(#{operation := status}, {ok, Json}, State) ->
    {{ok, (status(State))#{backend => decoded(Json)}}, State};
note(_Call, Result, State) ->
    {Result, State}.

closed_meanwhile() ->
    {error, {invalid_argument, <<"the backend or the graph was closed meanwhile: load the model again">>}}.

add_context(Id, Graph, SessionId, Owner, IsSaved, #state{books = Books, calls = Calls} = State) ->
    State#state{
        books = wasi_nn_books:add_context(Id, Graph, SessionId, IsSaved, Books),
        calls = wasi_nn_calls:watch_owner(Id, Owner, Calls)
    }.

decoded(Json) ->
    case wasi_nn_json:decode(Json) of
        {ok, Term} -> Term;
        error -> #{}
    end.

status(#state{transport = Transport, other_side = OtherSide, phase = Phase} = State) ->
    Known = maps:merge(wasi_nn_books:counts(State#state.books), #{
        transport => maps:get(transport, State#state.options, port),
        state => phase_name(Phase),
        n_calls => wasi_nn_calls:count(State#state.calls),
        n_restarts => max(0, State#state.n_starts - 1)
    }),
    case Phase of
        waiting -> Known;
        _ -> maps:merge(Known, Transport:info(OtherSide))
    end.

phase_name({restoring, _Stage, _Pending}) -> starting;
phase_name(Phase) -> Phase.

%% -- Requests ------------------------------------------------------------------------------------------------------

hold(Request, From, #state{held = Held, options = Options} = State) ->
    case queue:len(Held) < maps:get(max_waiting, Options) of
        true ->
            State#state{held = queue:in({Request, From}, Held)};
        false ->
            gen_server:reply(From, {error, {busy, <<"too many calls wait for the other side to start: try again">>}}),
            State
    end.

perform({init_backend, Config}, From, State) ->
    send_call(init_backend, [new_id(), Config], From, State);
perform({load_by_name, Backend, Name, Config}, From, State) ->
    with_backend(Backend, From, State, fun() ->
        send_call(load_by_name, [Backend, new_id(), Name, Config], From, State)
    end);
perform({status, Backend}, From, State) ->
    with_backend(Backend, From, State, fun() -> send_call(status, [Backend], From, State) end);
perform({deinit_backend, Backend}, From, #state{books = Books} = State) ->
    with_backend(Backend, From, State, fun() ->
        {Contexts, Rest} = wasi_nn_books:remove_backend(Backend, Books),
        Cancelled = lists:foldl(fun(Context, Acc) -> element(2, cancel_target(Context, Acc)) end, State, Contexts),
        Forgotten = lists:foldl(fun forget_context/2, Cancelled#state{books = Rest}, Contexts),
        send_call(deinit_backend, [Backend], From, Forgotten)
    end);
perform({unload, Backend, Graph}, From, #state{books = Books} = State) ->
    with_graph(Backend, Graph, From, State, fun() ->
        send_call(unload, [Graph], From, State#state{books = wasi_nn_books:remove_graph(Graph, Books)})
    end);
perform({init_execution_context, Backend, Graph, SessionId}, From, State) ->
    with_graph(Backend, Graph, From, State, fun() ->
        send_call(init_execution_context, [Graph, new_id(), SessionId], From, State)
    end);
perform({set_input, Backend, Context, Index, Data}, From, State) ->
    on_context(set_input, Backend, Context, [Context, Index, Data], From, State);
perform({get_output, Backend, Context, Index}, From, State) ->
    on_context(get_output, Backend, Context, [Context, Index], From, State);
perform({compute, Backend, Context}, From, State) ->
    on_context(compute, Backend, Context, [Context], From, State);
perform({Operation, Backend, Context, Prompt, Config}, From, State) when
    Operation =:= run_inference; Operation =:= stream
->
    on_context(Operation, Backend, Context, [Context, Prompt, Config], From, State);
perform({close_execution_context, Backend, Context}, From, #state{books = Books} = State) ->
    case wasi_nn_books:backend_of(Context, Books) of
        {ok, Owner} when Owner =:= Backend; From =:= none ->
            {_Answer, Cancelled} = cancel_target(Context, State),
            send_call(close_execution_context, [Context], From, forget_context(Context, Cancelled));
        _ when From =:= none ->
            State;
        _ ->
            Message = <<"the execution context is closed already, or is another backend's">>,
            gen_server:reply(From, {error, {invalid_argument, Message}}),
            State
    end.

with_backend(Backend, From, #state{books = Books} = State, Continue) ->
    case wasi_nn_books:has_backend(Backend, Books) of
        true ->
            Continue();
        false ->
            gen_server:reply(From, {error, {invalid_argument, <<"the backend is closed: init_backend opens one">>}}),
            State
    end.

with_graph(Backend, Graph, From, #state{books = Books} = State, Continue) ->
    case wasi_nn_books:check_graph(Backend, Graph, Books) of
        ok ->
            Continue();
        {error, Reason} ->
            gen_server:reply(From, {error, Reason}),
            State
    end.

on_context(Operation, Backend, Context, Arguments, From, #state{books = Books} = State) ->
    Id = new_id(),
    case wasi_nn_books:enter(Backend, Context, Id, Operation, Books) of
        {ok, Entered} ->
            Call = call(Operation, Arguments, caller(Operation, From)),
            send(Id, Call#{context := Context}, State#state{books = Entered});
        {error, Reason, Noted} ->
            gen_server:reply(From, {error, Reason}),
            State#state{books = Noted}
    end.

send_call(Operation, Arguments, From, State) ->
    send(new_id(), call(Operation, Arguments, caller(Operation, From)), State).

send_internal(Operation, Arguments, State) ->
    send(new_id(), call(Operation, Arguments, none), State).

call(Operation, Arguments, Caller) ->
    #{operation => Operation, arguments => Arguments, caller => Caller, context => none}.

%% Who reads a stream knows its name before the first token comes.
caller(stream, {Pid, _Tag} = From) ->
    Stream = make_ref(),
    gen_server:reply(From, {ok, Stream}),
    {stream, Pid, Stream};
caller(_Operation, none) ->
    none;
caller(_Operation, From) ->
    {call, From}.

send(Id, Call, #state{transport = Transport, other_side = OtherSide, calls = Calls} = State) ->
    #{operation := Operation, arguments := Arguments} = Call,
    Sent = State#state{calls = wasi_nn_calls:add(Id, Call, Calls)},
    case Transport:request(Id, Operation, Arguments, OtherSide) of
        {ok, NewSide} ->
            Sent#state{other_side = NewSide};
        {busy, NewSide} ->
            Busy = {error, {busy, <<"too many calls wait for the other side: try again">>}},
            event({reply, Id, Busy}, Sent#state{other_side = NewSide})
    end.

%% Never used twice, also not by a server after this one.
new_id() ->
    erlang:unique_integer([positive, monotonic]).

%% -- Ending things -------------------------------------------------------------------------------------------------

cancel_target(Stream, #state{calls = Calls} = State) when is_reference(Stream) ->
    case wasi_nn_calls:of_stream(Stream, Calls) of
        {ok, Id} -> {cancelled, cancel(Id, State)};
        error -> {idle, State}
    end;
cancel_target(Context, #state{books = Books} = State) ->
    case wasi_nn_books:active_call(Context, Books) of
        {ok, Id} -> {cancelled, cancel(Id, State)};
        error -> {idle, State}
    end.

cancel(Id, #state{calls = Calls} = State) ->
    case wasi_nn_calls:begin_cancel(Id, Calls) of
        {ok, Marked} -> send_cancel(Id, State#state{calls = Marked});
        error -> State
    end.

send_cancel(Id, #state{transport = Transport, other_side = OtherSide, calls = Calls} = State) ->
    case wasi_nn_calls:is_under_way(Id, Calls) of
        true ->
            _ = erlang:start_timer(?CANCEL_AGAIN_MS, self(), {wasi_nn_server, cancel, Id}),
            State#state{other_side = Transport:cancel(Id, OtherSide)};
        false ->
            State
    end.

owner_died(Context, #state{phase = up} = State) ->
    perform({close_execution_context, 0, Context}, none, State);
owner_died(Context, #state{held = Held} = State) ->
    State#state{held = queue:in({{close_execution_context, 0, Context}, none}, Held)}.

forget_context(Context, #state{books = Books, calls = Calls} = State) ->
    State#state{
        books = wasi_nn_books:remove_context(Context, Books), calls = wasi_nn_calls:forget_owner(Context, Calls)
    }.
