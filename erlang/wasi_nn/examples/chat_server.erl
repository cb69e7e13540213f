%% @doc One server for many users' chats: a `gen_server' that never waits for a model.
%%
%% ```
%% {ok, _} = application:ensure_all_started(wasi_nn),
%% {ok, Chat} = chat_server:start_link("smollm2", #{max_concurrent => 16, save_dir => <<"/var/lib/chats">>}),
%% {ok, Answer} = chat_server:say(Chat, <<"ada">>, <<"Name the capital city of France.">>).
%% '''
%%
%% Each user has a session of that name. Answers arrive as streams, so that while one user's is made the server takes
%% the next message; a user's second message waits for the first one's answer. With `save_dir' conversations outlive the
%% server, the process that computes, and the node. A session that a limit has closed (`idle_timeout_ms',
%% `max_sessions') is opened again with its user's next message: with `save_dir' it goes on, else it begins anew.
-module(chat_server).
-behaviour(gen_server).

-export([start_link/2, say/3, forget/2, stop/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

%% How often a message is said until it is answered: the process that computes may be replaced, the session be closed by
%% a limit.
-define(N_ATTEMPTS, 3).

-type user() :: binary().
-type message() :: {binary(), gen_server:from(), Attempts :: pos_integer()}.

-record(user, {
    context :: wasi_nn:execution_context(),
    %% The answer under way: its stream, what it answers, and its text so far, newest first.
    answering :: {wasi_nn:stream(), message(), [binary()]} | undefined,
    waiting = queue:new() :: queue:queue(message())
}).
-record(state, {
    backend :: wasi_nn:backend(),
    model :: wasi_nn:graph(),
    users = #{} :: #{user() => #user{}},
    streams = #{} :: #{wasi_nn:stream() => user()}
}).

-spec start_link(wasi_nn:text(), wasi_nn:config()) -> {ok, pid()} | ignore | {error, term()}.
start_link(Model, Config) ->
    gen_server:start_link(?MODULE, {Model, Config}, []).

%% @doc What the model answers to a user. Waits as long as it takes.
-spec say(pid(), user(), binary()) -> wasi_nn:result(binary()).
say(Server, User, Text) ->
    gen_server:call(Server, {say, User, Text}, infinity).

%% @doc End a user's session, which `save_dir' keeps on disk. Whoever waits for an answer gets the error `cancelled'.
-spec forget(pid(), user()) -> ok.
forget(Server, User) ->
    gen_server:call(Server, {forget, User}, infinity).

-spec stop(pid()) -> ok.
stop(Server) ->
    gen_server:stop(Server).

-spec init({wasi_nn:text(), wasi_nn:config()}) -> {ok, #state{}} | {stop, wasi_nn:reason()}.
init({Model, Config}) ->
    case wasi_nn:init_backend(Config) of
        {ok, Backend} ->
            case wasi_nn:load_by_name(Backend, Model) of
                {ok, Graph} -> {ok, #state{backend = Backend, model = Graph}};
                {error, Reason} -> {stop, Reason}
            end;
        {error, Reason} ->
            {stop, Reason}
    end.

-spec handle_call(term(), gen_server:from(), #state{}) -> {noreply, #state{}} | {reply, term(), #state{}}.
handle_call({say, Name, Text}, From, State) ->
    case user(Name, State) of
        {ok, #user{waiting = Waiting} = User} ->
            Queued = User#user{waiting = queue:in({Text, From, ?N_ATTEMPTS}, Waiting)},
            {noreply, answer_next(Name, Queued, State)};
        {error, Reason} ->
            {reply, {error, Reason}, State}
    end;
handle_call({forget, Name}, _From, #state{backend = Backend, users = Users, streams = Streams} = State) ->
    case maps:take(Name, Users) of
        {#user{context = Context, answering = Answering, waiting = Waiting}, Rest} ->
            _ = wasi_nn:close_execution_context(Backend, Context),
            %% A generator leaves out what does not match, such as undefined.
            Messages = [Message || {_Stream, Message, _Texts} <- [Answering]] ++ queue:to_list(Waiting),
            Error = {error, {cancelled, <<"the session was ended">>}},
            _ = [gen_server:reply(From, Error) || {_Text, From, _Attempts} <- Messages],
            Left = maps:filter(fun(_Stream, Other) -> Other =/= Name end, Streams),
            {reply, ok, State#state{users = Rest, streams = Left}};
        error ->
            {reply, ok, State}
    end.

-spec handle_cast(term(), #state{}) -> {noreply, #state{}}.
handle_cast(_Message, State) ->
    {noreply, State}.

-spec handle_info(term(), #state{}) -> {noreply, #state{}}.
handle_info({wasi_nn, Stream, Event}, #state{users = Users, streams = Streams} = State) ->
    case Streams of
        #{Stream := Name} -> {noreply, event(Event, Name, maps:get(Name, Users), State)};
        _ -> {noreply, State}
    end;
handle_info(_Message, State) ->
    {noreply, State}.

-spec terminate(term(), #state{}) -> ok.
terminate(_Reason, #state{backend = Backend}) ->
    _ = wasi_nn:deinit_backend(Backend),
    ok.

%% A session is opened when its user says the first thing.
user(Name, #state{backend = Backend, model = Model, users = Users}) ->
    case Users of
        #{Name := User} ->
            {ok, User};
        _ ->
            case wasi_nn:init_execution_context_with_session_id(Backend, Model, Name) of
                {ok, Context} -> {ok, #user{context = Context}};
                {error, Reason} -> {error, Reason}
            end
    end.

answer_next(Name, #user{answering = undefined, waiting = Waiting} = User, State) ->
    case queue:out(Waiting) of
        {{value, Message}, Rest} -> answer(Name, Message, User#user{waiting = Rest}, State);
        {empty, _} -> keep(Name, User, State)
    end;
answer_next(Name, User, State) ->
    keep(Name, User, State).

answer(Name, {Text, _From, _Attempts} = Message, #user{context = Context} = User, State) ->
    #state{backend = Backend, streams = Streams} = State,
    case wasi_nn:stream(Backend, Context, Text) of
        {ok, Stream} ->
            keep(Name, User#user{answering = {Stream, Message, []}}, State#state{streams = Streams#{Stream => Name}});
        {error, Reason} ->
            failed(Reason, Name, Message, User, State)
    end.

event({token, Text}, Name, #user{answering = {Stream, Message, Texts}} = User, State) ->
    keep(Name, User#user{answering = {Stream, Message, [Text | Texts]}}, State);
event({done, _Metadata}, Name, #user{answering = {Stream, {_Text, From, _Attempts}, Texts}} = User, State) ->
    gen_server:reply(From, {ok, iolist_to_binary(lists:reverse(Texts))}),
    answer_next(Name, User#user{answering = undefined}, without(Stream, State));
event({error, Reason}, Name, #user{answering = {Stream, Message, _Texts}} = User, State) ->
    failed(Reason, Name, Message, User#user{answering = undefined}, without(Stream, State)).

%% What was lost with the process that computed can be said again.
failed({restarted, _Reason}, Name, {Text, From, Attempts}, User, State) when Attempts > 1 ->
    answer(Name, {Text, From, Attempts - 1}, User, State);
failed({invalid_argument, _Reason}, Name, {Text, From, Attempts}, User, State) when Attempts > 1 ->
    answer_reopened(Name, {Text, From, Attempts - 1}, User, State);
failed(Reason, Name, {_Text, From, _Attempts}, User, State) ->
    gen_server:reply(From, {error, Reason}),
    answer_next(Name, User, State).

%% Either a limit has closed the session, or the message itself is wrong. So the session is opened before its old
%% context is closed: one that lives keeps its conversation.
answer_reopened(Name, Message, #user{context = Old} = User, #state{backend = Backend, model = Model} = State) ->
    case wasi_nn:init_execution_context_with_session_id(Backend, Model, Name) of
        {ok, Context} ->
            _ = wasi_nn:close_execution_context(Backend, Old),
            answer(Name, Message, User#user{context = Context}, State);
        {error, Reason} ->
            failed(Reason, Name, Message, User, State)
    end.

keep(Name, User, #state{users = Users} = State) ->
    State#state{users = Users#{Name => User}}.

without(Stream, #state{streams = Streams} = State) ->
    State#state{streams = maps:remove(Stream, Streams)}.
