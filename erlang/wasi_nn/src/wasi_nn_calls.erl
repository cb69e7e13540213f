%% @doc The calls under way: who waits for which, and whose death ends what. Used in the server's process, which gets the
%% monitors' messages.
-module(wasi_nn_calls).

-export([new/0, add/3, take/2, take_all/1, count/1, is_under_way/2]).
-export([result/3, answer/2, token/3, of_stream/2, begin_cancel/2]).
-export([watch_owner/3, forget_owner/2, died/2]).
-export_type([calls/0, call/0, caller/0]).

-type id() :: wasi_nn_transport:id().
%% `none': nobody waits for the answer (any more). `restore': the server itself, to open this again.
-type caller() :: {call, gen_server:from()} | {stream, pid(), wasi_nn:stream()} | {restore, id()} | none.
-type call() :: #{
    operation := wasi_nn_transport:operation(),
    arguments := [wasi_nn_transport:argument()],
    caller := caller(),
    %% The context that it works on.
    context := id() | none
}.

-record(calls, {
    calls = #{} :: #{id() => call()},
    cancelled = #{} :: #{id() => []},
    streams = #{} :: #{wasi_nn:stream() => id()},
    %% Of callers, by call, and of owners, by context.
    callers = #{} :: #{id() => reference()},
    owners = #{} :: #{id() => reference()},
    monitors = #{} :: #{reference() => {call | context, id()}}
}).
-opaque calls() :: #calls{}.

-spec new() -> calls().
new() ->
    #calls{}.

%% @doc A call begins; its caller is watched. With {@link take/2} it ends.
-spec add(id(), call(), calls()) -> calls().
add(Id, #{caller := Caller} = Call, #calls{calls = All, callers = Callers, streams = Streams} = Calls) ->
    Added = Calls#calls{calls = All#{Id => Call}},
    case Caller of
        {call, {Pid, _Tag}} ->
            {Monitor, Watching} = watch(Pid, {call, Id}, Added),
            Watching#calls{callers = Callers#{Id => Monitor}};
        {stream, Pid, Stream} ->
            {Monitor, Watching} = watch(Pid, {call, Id}, Added),
            Watching#calls{callers = Callers#{Id => Monitor}, streams = Streams#{Stream => Id}};
        _Nobody ->
            Added
    end.

%% @doc A call has ended: its caller is no longer watched.
-spec take(id(), calls()) -> {call(), calls()} | error.
take(Id, #calls{calls = All, cancelled = Cancelled, callers = Callers} = Calls) ->
    case maps:take(Id, All) of
        {Call, Rest} ->
            Ended = Calls#calls{
                calls = Rest, cancelled = maps:remove(Id, Cancelled), callers = maps:remove(Id, Callers)
            },
            {Call, unwatch(maps:find(Id, Callers), without_stream(Call, Ended))};
        error ->
            error
    end.

%% @doc All calls have ended.
-spec take_all(calls()) -> {[call()], calls()}.
take_all(#calls{calls = All} = Calls) ->
    Take = fun(Id, {Taken, Left}) ->
        {Call, Rest} = take(Id, Left),
        {[Call | Taken], Rest}
    end,
    lists:foldl(Take, {[], Calls}, maps:keys(All)).

-spec count(calls()) -> non_neg_integer().
count(#calls{calls = All}) ->
    map_size(All).

-spec is_under_way(id(), calls()) -> boolean().
is_under_way(Id, #calls{calls = All}) ->
    is_map_key(Id, All).

%% @doc What a call's reply means. One that was cancelled because its context is being closed may have come too late for
%% its cancel, and found the context closed.
-spec result(id(), wasi_nn_transport:result(), calls()) -> wasi_nn_transport:result().
result(Id, {error, {invalid_argument, _Message}}, #calls{cancelled = Cancelled}) when is_map_key(Id, Cancelled) ->
    {error, {cancelled, <<"the call was cancelled">>}};
result(_Id, Reply, _Calls) ->
    Reply.

%% @doc Tell whoever waits what came of a call.
-spec answer(call(), wasi_nn_transport:result()) -> ok.
answer(#{caller := {call, From}}, Result) ->
    gen_server:reply(From, Result);
answer(#{caller := {stream, Pid, Stream}}, {ok, Metadata}) ->
    send(Pid, {wasi_nn, Stream, {done, Metadata}});
answer(#{caller := {stream, Pid, Stream}}, {error, Reason}) ->
    send(Pid, {wasi_nn, Stream, {error, Reason}});
answer(#{caller := _Nobody}, _Result) ->
    ok.

%% @doc Send a piece of text to whoever reads a stream.
-spec token(id(), binary(), calls()) -> ok.
token(Id, Text, #calls{calls = All}) ->
    case All of
        #{Id := #{caller := {stream, Pid, Stream}}} -> send(Pid, {wasi_nn, Stream, {token, Text}});
        _ -> ok
    end.

send(Pid, Message) ->
    Pid ! Message,
    ok.

%% @doc The call of a stream that is not over.
-spec of_stream(wasi_nn:stream(), calls()) -> {ok, id()} | error.
of_stream(Stream, #calls{streams = Streams}) ->
    maps:find(Stream, Streams).

%% @doc `error' where there is nothing to cancel, or it is cancelled already.
-spec begin_cancel(id(), calls()) -> {ok, calls()} | error.
begin_cancel(Id, #calls{calls = All, cancelled = Cancelled} = Calls) when
    is_map_key(Id, All), not is_map_key(Id, Cancelled)
->
    {ok, Calls#calls{cancelled = Cancelled#{Id => []}}};
begin_cancel(_Id, _Calls) ->
    error.

%% @doc Watch the owner of a context.
-spec watch_owner(id(), pid(), calls()) -> calls().
watch_owner(Context, Owner, #calls{owners = Owners} = Calls) ->
    {Monitor, Watching} = watch(Owner, {context, Context}, Calls),
    Watching#calls{owners = Owners#{Context => Monitor}}.

-spec forget_owner(id(), calls()) -> calls().
forget_owner(Context, #calls{owners = Owners} = Calls) ->
    unwatch(maps:find(Context, Owners), Calls#calls{owners = maps:remove(Context, Owners)}).

%% @doc What a monitor's message means. A call whose caller has died goes on without one.
-spec died(reference(), calls()) -> {call | context, id(), calls()} | unknown.
died(Monitor, #calls{monitors = Monitors, calls = All, callers = Callers} = Calls) ->
    case maps:take(Monitor, Monitors) of
        {{call, Id}, Rest} ->
            #{Id := Call} = All,
            Orphaned = All#{Id := Call#{caller := none}},
            Left = Calls#calls{monitors = Rest, calls = Orphaned, callers = maps:remove(Id, Callers)},
            {call, Id, without_stream(Call, Left)};
        {{context, Context}, Rest} ->
            Owners = maps:remove(Context, Calls#calls.owners),
            {context, Context, Calls#calls{monitors = Rest, owners = Owners}};
        error ->
            unknown
    end.

without_stream(#{caller := {stream, _Pid, Stream}}, #calls{streams = Streams} = Calls) ->
    Calls#calls{streams = maps:remove(Stream, Streams)};
without_stream(_Call, Calls) ->
    Calls.

watch(Pid, What, #calls{monitors = Monitors} = Calls) ->
    Monitor = erlang:monitor(process, Pid),
    {Monitor, Calls#calls{monitors = Monitors#{Monitor => What}}}.

unwatch({ok, Monitor}, #calls{monitors = Monitors} = Calls) ->
    true = erlang:demonitor(Monitor, [flush]),
    Calls#calls{monitors = maps:remove(Monitor, Monitors)};
unwatch(error, Calls) ->
    Calls.
