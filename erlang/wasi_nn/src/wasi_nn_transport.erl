%% @doc What `wasi_nn_server' needs of a way to the backend. There are two: {@link wasi_nn_port} and
%% {@link wasi_nn_nif_transport}.
%%
%% A transport runs in the server's process and never blocks it. Requests are answered by events, in any order, which
%% come out of the messages that the server receives. Backends, graphs and contexts have numbers that the server
%% chooses, so that they stay the same when the other side is replaced.
-module(wasi_nn_transport).

-export([module/1]).
-export_type([id/0, operation/0, argument/0, event/0, result/0, options/0]).

-type id() :: pos_integer().
-type argument() :: integer() | binary().
-type operation() ::
    init_backend
    | deinit_backend
    | status
    | load_by_name
    | unload
    | init_execution_context
    | set_input
    | compute
    | get_output
    | run_inference
    | stream
    | close_execution_context.
-type result() :: {ok, term()} | {error, wasi_nn:reason()}.
-type event() ::
    ready
    | {reply, id(), result()}
    | {token, id(), binary()}
    %% The other side is gone, and everything that was open there.
    | {down, binary()}.
%% The application's environment.
-type options() :: #{atom() => term()}.

%% Begin to start the other side; `ready' or `down' follows.
-callback start(options()) -> {ok, State :: term()} | {error, binary()}.
%% `busy': nothing was sent.
-callback request(id(), operation(), [argument()], State) -> {ok | busy, State} when State :: term().
%% Stop a call. Its reply follows in any case; a cancel that comes too early is repeated by the server.
-callback cancel(id(), State) -> State when State :: term().
%% `unknown': the message was for somebody else.
-callback handle_info(Message :: term(), State) -> {[event()], State} | unknown when State :: term().
%% What {@link wasi_nn:status/1} shows of it.
-callback info(State :: term()) -> #{atom() => term()}.
-callback stop(State :: term()) -> ok.

%% @doc The module of a transport's name.
-spec module(term()) -> {ok, module()} | {error, binary()}.
module(port) ->
    {ok, wasi_nn_port};
module(nif) ->
    {ok, wasi_nn_nif_transport};
module(_Other) ->
    {error, <<"the application's transport is port or nif: correct the environment of wasi_nn">>}.
