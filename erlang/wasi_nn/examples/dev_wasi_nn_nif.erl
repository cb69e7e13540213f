%% @doc A drop-in for the module of this name in HyperBEAM: the calls that its device makes, over {@link wasi_nn}.
%%
%% A "context" there is a backend with one model, sessions are kept by name, and whoever asks may be a process that ends
%% with its request. So everything that is opened here belongs to one process, which starts with the first call and
%% closes it when it ends. Texts may be strings or binaries, and sessions of one name go on where they were. A session
%% that a limit has closed (`idle_timeout_ms', `max_sessions') is opened again by the next call on it.
%%
%% Differences: results are never raised, answers may have any length, and errors are `{error, {Code, Message}}'.
-module(dev_wasi_nn_nif).
-behaviour(gen_server).

-export([init_backend/0, init_backend_with_config/1, deinit_backend/1]).
-export([load_by_name_with_config/3, switch_model/2, get_current_model_info/0]).
-export([init_execution_context/2, init_execution_context_once/2, close_execution_context/2]).
-export([run_inference/3, run_inference/4, run_inference_with_options/4, set_input/3, compute/2, get_output/3]).
-export([cleanup_model_contexts/1, cleanup_all_contexts/0]).
-export([init/1, handle_call/3, handle_cast/2]).

%% With more sessions in use than `max_sessions' one may be closed again before its call.
-define(N_ATTEMPTS, 3).

-type context() :: wasi_nn:backend().
%% The name, and its context when the session was asked for.
-type session() :: {wasi_nn:text(), wasi_nn:execution_context()}.
-type error() :: {error, wasi_nn:reason() | no_model_loaded}.

-record(state, {
    models = #{} :: #{Path :: wasi_nn:text() => {context(), wasi_nn:config()}},
    current :: wasi_nn:text() | undefined,
    sessions = #{} :: #{{context(), wasi_nn:text()} => wasi_nn:execution_context()}
}).

-spec init_backend() -> {ok, context()} | error().
init_backend() ->
    init_backend_with_config(#{}).

-spec init_backend_with_config(wasi_nn:config()) -> {ok, context()} | error().
init_backend_with_config(Config) ->
    start(),
    wasi_nn:init_backend(Config).

-spec deinit_backend(context()) -> ok | error().
deinit_backend(Context) ->
    without_value(call({deinit, Context})).

%% @doc Load the model of a context.
-spec load_by_name_with_config(context(), wasi_nn:text(), wasi_nn:config()) -> ok | error().
load_by_name_with_config(Context, Path, Config) ->
    without_value(wasi_nn:load_by_name_with_config(Context, Path, Config)).

%% @doc The context of a model, loaded at the first call, and again when its configuration changes.
-spec switch_model(wasi_nn:text(), wasi_nn:config()) -> {ok, context()} | error().
switch_model(Path, Config) ->
    call({switch_model, Path, Config}).

-spec get_current_model_info() -> {ok, {wasi_nn:text(), wasi_nn:config(), context()}} | error().
get_current_model_info() ->
    call(current).

-spec init_execution_context(context(), wasi_nn:text()) -> {ok, session()} | error().
init_execution_context(Context, SessionId) ->
    call({session, Context, SessionId}).

%% @doc The same: a session of one name is opened once.
-spec init_execution_context_once(context(), wasi_nn:text()) -> {ok, session()} | error().
init_execution_context_once(Context, SessionId) ->
    init_execution_context(Context, SessionId).

-spec close_execution_context(context(), session()) -> ok | error().
close_execution_context(Context, {SessionId, _Open}) ->
    without_value(call({close, Context, SessionId}));
close_execution_context(_Context, _NoSession) ->
    {error, no_session()}.

-spec run_inference(context(), session(), wasi_nn:text()) -> {ok, binary()} | error().
run_inference(Context, Session, Prompt) ->
    run_inference(Context, Session, Prompt, #{}).

-spec run_inference(context(), session(), wasi_nn:text(), wasi_nn:config()) -> {ok, binary()} | error().
run_inference(Context, Session, Prompt, Options) ->
    in_session(Context, Session, fun(Open) -> wasi_nn:run_inference(Context, Open, Prompt, Options) end).

-spec run_inference_with_options(context(), session(), wasi_nn:text(), wasi_nn:config()) -> {ok, binary()} | error().
run_inference_with_options(Context, Session, Prompt, Options) ->
    run_inference(Context, Session, Prompt, Options).

-spec set_input(context(), session(), wasi_nn:text()) -> ok | error().
set_input(Context, Session, Prompt) ->
    without_value(in_session(Context, Session, fun(Open) -> wasi_nn:set_input(Context, Open, 0, Prompt) end)).

-spec compute(context(), session()) -> ok | error().
compute(Context, Session) ->
    without_value(in_session(Context, Session, fun(Open) -> wasi_nn:compute(Context, Open) end)).

-spec get_output(context(), session(), wasi_nn:index()) -> {ok, binary()} | error().
get_output(Context, Session, Index) ->
    in_session(Context, Session, fun(Open) -> wasi_nn:get_output(Context, Open, Index) end).

-spec cleanup_model_contexts(wasi_nn:text()) -> ok.
cleanup_model_contexts(Path) ->
    call({cleanup, Path}).

-spec cleanup_all_contexts() -> ok.
cleanup_all_contexts() ->
    call(cleanup).

in_session(Context, {SessionId, Open}, Work) ->
    in_session(Context, SessionId, Open, Work, ?N_ATTEMPTS);
in_session(_Context, _NoSession, _Work) ->
    {error, no_session()}.

%% Work that is refused is done again where the reason was that the session's context is closed.
in_session(Context, SessionId, Open, Work, Attempts) ->
    case Work(Open) of
        {error, {invalid_argument, _Message}} = Refused when Attempts > 1 ->
            case call({reopen, Context, SessionId}) of
                {ok, Open} -> Refused;
                {ok, Reopened} -> in_session(Context, SessionId, Reopened, Work, Attempts - 1);
                {error, Reason} -> {error, Reason}
            end;
        Result ->
            Result
    end.

%% -- The process that owns the sessions ----------------------------------------------------------------------------

start() ->
    case gen_server:start({local, ?MODULE}, ?MODULE, [], []) of
        {ok, _Pid} -> ok;
        {error, {already_started, _Pid}} -> ok
    end.

call(Request) ->
    start(),
    gen_server:call(?MODULE, Request, infinity).

-spec init([]) -> {ok, #state{}}.
init([]) ->
    {ok, _} = application:ensure_all_started(wasi_nn),
    {ok, #state{}}.

-spec handle_call(term(), gen_server:from(), #state{}) -> {reply, term(), #state{}}.
handle_call({switch_model, Path, Config}, _From, #state{models = Models} = State) ->
    case Models of
        #{Path := {Context, Config}} ->
            {reply, {ok, Context}, State#state{current = Path}};
        #{Path := {Old, _OtherConfig}} ->
            {_Result, Left} = close_backend(Old, State),
            open_model(Path, Config, Left);
        _ ->
            open_model(Path, Config, State)
    end;
handle_call(current, _From, #state{models = Models, current = Path} = State) ->
    case Models of
        #{Path := {Context, Config}} -> {reply, {ok, {Path, Config, Context}}, State};
        _ -> {reply, {error, no_model_loaded}, State}
    end;
handle_call({session, Context, SessionId}, _From, #state{sessions = Sessions} = State) ->
    case Sessions of
        #{{Context, SessionId} := Open} ->
            {reply, {ok, {SessionId, Open}}, State};
        _ ->
            case open_session(Context, SessionId, State) of
                {ok, Open, NewState} -> {reply, {ok, {SessionId, Open}}, NewState};
                {error, Reason} -> {reply, {error, Reason}, State}
            end
    end;
handle_call({reopen, Context, SessionId}, _From, #state{sessions = Sessions} = State) ->
    case Sessions of
        #{{Context, SessionId} := Open} -> reopen_session(Context, SessionId, Open, State);
        _ -> {reply, {error, session_closed()}, State}
    end;
handle_call({close, Context, SessionId}, _From, #state{sessions = Sessions} = State) ->
    case maps:take({Context, SessionId}, Sessions) of
        {Open, Left} -> {reply, wasi_nn:close_execution_context(Context, Open), State#state{sessions = Left}};
        error -> {reply, {error, session_closed()}, State}
    end;
handle_call({deinit, Context}, _From, State) ->
    {Result, Left} = close_backend(Context, State),
    {reply, Result, Left};
handle_call({cleanup, Path}, _From, #state{models = Models} = State) ->
    case Models of
        #{Path := {Context, _Config}} -> {reply, ok, element(2, close_backend(Context, State))};
        _ -> {reply, ok, State}
    end;
handle_call(cleanup, _From, #state{models = Models}) ->
    _ = [wasi_nn:deinit_backend(Context) || {Context, _Config} <- maps:values(Models)],
    {reply, ok, #state{}}.

-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast(_Message, State) ->
    {noreply, State}.

open_model(Path, Config, #state{models = Models} = State) ->
    case wasi_nn:init_backend() of
        {ok, Context} ->
            case wasi_nn:load_by_name_with_config(Context, Path, Config) of
                {ok, _Graph} ->
                    {reply, {ok, Context}, State#state{models = Models#{Path => {Context, Config}}, current = Path}};
                {error, Reason} ->
                    _ = wasi_nn:deinit_backend(Context),
                    {reply, {error, Reason}, State}
            end;
        {error, Reason} ->
            {reply, {error, Reason}, State}
    end.

open_session(Context, SessionId, #state{sessions = Sessions} = State) ->
    case wasi_nn:latest_graph(Context) of
        {ok, Graph} ->
            case wasi_nn:init_execution_context_with_session_id(Context, Graph, SessionId) of
                {ok, Open} -> {ok, Open, State#state{sessions = Sessions#{{Context, SessionId} => Open}}};
                {error, Reason} -> {error, Reason}
            end;
        {error, Reason} ->
            {error, Reason}
    end.

%% Configuration that changes nothing is refused by a closed context only. Without this question a wrong prompt would
%% end what others do in the session.
reopen_session(Context, SessionId, Old, State) ->
    case wasi_nn:set_input(Context, Old, 1, #{}) of
        {error, {invalid_argument, _Message}} ->
            case open_session(Context, SessionId, State) of
                {ok, Open, NewState} ->
                    _ = wasi_nn:close_execution_context(Context, Old),
                    {reply, {ok, Open}, NewState};
                {error, Reason} ->
                    {reply, {error, Reason}, State}
            end;
        {error, {restarted, _Message} = Reason} ->
            %% Somebody has to hear it, and it is said once.
            {reply, {error, Reason}, State};
        _IsOpen ->
            {reply, {ok, Old}, State}
    end.

no_session() ->
    {invalid_argument, <<"a session is what init_execution_context gives">>}.

session_closed() ->
    {invalid_argument, <<"the session is closed: init_execution_context opens it">>}.

close_backend(Context, #state{models = Models, sessions = Sessions} = State) ->
    {wasi_nn:deinit_backend(Context), State#state{
        models = maps:filter(fun(_Path, {Other, _Config}) -> Other =/= Context end, Models),
        sessions = maps:filter(fun({Other, _SessionId}, _Session) -> Other =/= Context end, Sessions)
    }}.

without_value({ok, _Value}) -> ok;
without_value({error, Reason}) -> {error, Reason}.
