%% @doc The transport `port': an operating system process, `wasi-nn port', that all callers share.
%%
%% Packets are external terms with their length in front. What comes back is read without making atoms; whatever is no
%% term of the protocol costs the process its life.
-module(wasi_nn_port).
-behaviour(wasi_nn_transport).

-export([start/1, request/4, cancel/2, handle_info/2, info/1, stop/1]).

-include_lib("kernel/include/logger.hrl").

%% Never a call's number.
-define(PING_ID, 0).
%% Above so many bytes that the process has not read, callers get `busy'.
-define(BUSY_LIMITS, {16#1000000, 16#4000000}).

-record(state, {
    port :: port(),
    os_pid :: non_neg_integer(),
    options :: wasi_nn_transport:options(),
    %% Runs out when the process does not start, or does not answer a ping.
    deadline :: reference() | undefined
}).

-spec start(wasi_nn_transport:options()) -> {ok, #state{}} | {error, binary()}.
start(Options) ->
    Command = maps:get(port_command, Options),
    case os:find_executable(Command) of
        false ->
            {error, text("there is no command ~ts: install wasi-nn-backend, or set port_command to its path", [Command])};
        Path ->
            open(Path, Options)
    end.

open(Path, Options) ->
    PortOptions = [
        {args, maps:get(port_args, Options)},
        {env, maps:get(port_env, Options)},
        {busy_limits_port, ?BUSY_LIMITS},
        {packet, 4},
        binary,
        exit_status,
        use_stdio
    ],
    try
        Port = open_port({spawn_executable, Path}, PortOptions),
        {os_pid, OsPid} = erlang:port_info(Port, os_pid),
        Deadline = erlang:start_timer(maps:get(start_timeout_ms, Options), self(), {wasi_nn_port, start}),
        {ok, #state{port = Port, os_pid = OsPid, options = Options, deadline = Deadline}}
    catch
        error:Reason ->
            {error, text("~ts cannot be started: ~0p; set port_command and port_args", [Path, Reason])}
    end.

-spec request(wasi_nn_transport:id(), wasi_nn_transport:operation(), [wasi_nn_transport:argument()], #state{}) ->
    {ok | busy, #state{}}.
request(Id, Operation, Arguments, State) ->
    case send({call, Id, Operation, Arguments}, State) of
        true -> {ok, State};
        false -> {busy, State}
    end.

-spec cancel(wasi_nn_transport:id(), #state{}) -> #state{}.
cancel(Id, State) ->
    _ = send({cancel, Id}, State),
    State.

%% Never suspends the server: a process that does not read must not stop the node's side.
send(Term, #state{port = Port}) ->
    try
        erlang:port_command(Port, term_to_binary(Term), [nosuspend])
    catch
        %% The process has just ended; its exit status is on the way.
        error:badarg -> true
    end.

-spec handle_info(term(), #state{}) -> {[wasi_nn_transport:event()], #state{}} | unknown.
handle_info({Port, {data, Data}}, #state{port = Port} = State) ->
    try binary_to_term(Data, [safe]) of
        Term -> packet(Term, State)
    catch
        error:badarg -> {[], kill("it wrote something else than a term", State)}
    end;
handle_info({Port, {exit_status, Status}}, #state{port = Port} = State) ->
    {[{down, text("the wasi-nn process ended with status ~b", [Status])}], cancel_deadline(State)};
handle_info({'EXIT', Port, _Reason}, #state{port = Port} = State) ->
    {[], State};
handle_info({timeout, Deadline, {wasi_nn_port, Expected}}, #state{deadline = Deadline} = State) ->
    {[], kill(["it did not answer in time: ", atom_to_list(Expected)], State)};
handle_info({timeout, _Timer, {wasi_nn_port, ping}}, State) ->
    {[], ping(State)};
handle_info({timeout, _Timer, {wasi_nn_port, _Expected}}, State) ->
    {[], State};
handle_info(_Message, _State) ->
    unknown.

packet({ready, Version}, State) when is_binary(Version) ->
    {[ready], next_ping(cancel_deadline(State))};
packet({reply, ?PING_ID, _Pong}, State) ->
    {[], next_ping(cancel_deadline(State))};
packet({reply, Id, {ok, Result}}, State) when is_integer(Id) ->
    {[{reply, Id, {ok, Result}}], State};
packet({reply, Id, {error, Code, Message}}, State) when is_integer(Id), is_binary(Code), is_binary(Message) ->
    {[{reply, Id, {error, {wasi_nn_code:from_name(Code), Message}}}], State};
packet({token, Id, Text}, State) when is_integer(Id), is_binary(Text) ->
    {[{token, Id, Text}], State};
packet({fault, Message}, State) when is_binary(Message) ->
    ?LOG_WARNING("wasi_nn: the process did not understand a packet: ~ts", [Message]),
    {[], State};
packet(_Other, State) ->
    {[], kill("it wrote a term that is not of the protocol", State)}.

%% One ping at a time: the next one is due some time after the answer.
next_ping(State) ->
    _ = erlang:start_timer(option(ping_interval_ms, State), self(), {wasi_nn_port, ping}),
    State.

ping(State) ->
    _ = send({call, ?PING_ID, ping, []}, State),
    Deadline = erlang:start_timer(option(ping_timeout_ms, State), self(), {wasi_nn_port, pong}),
    State#state{deadline = Deadline}.

cancel_deadline(#state{deadline = undefined} = State) ->
    State;
cancel_deadline(#state{deadline = Deadline} = State) ->
    _ = erlang:cancel_timer(Deadline),
    State#state{deadline = undefined}.

%% Closing the port would not do: a process that hangs does not see the end of its input.
kill(Reason, #state{os_pid = OsPid} = State) ->
    ?LOG_ERROR("wasi_nn: process ~b is killed: ~ts", [OsPid, Reason]),
    _ = os:cmd("kill -KILL " ++ integer_to_list(OsPid)),
    cancel_deadline(State).

-spec info(#state{}) -> #{atom() => term()}.
info(#state{os_pid = OsPid}) ->
    #{os_pid => OsPid}.

%% The end of its input lets the process cancel everything and leave.
-spec stop(#state{}) -> ok.
stop(#state{port = Port} = State) ->
    _ = cancel_deadline(State),
    try
        true = port_close(Port),
        ok
    catch
        error:badarg -> ok
    end.

option(Name, #state{options = Options}) ->
    maps:get(Name, Options).

text(Format, Arguments) ->
    unicode:characters_to_binary(io_lib:format(Format, Arguments)).
