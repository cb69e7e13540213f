%% @doc The transport `nif': the backend inside of the node, through {@link wasi_nn_nif}.
%%
%% Each request has a process of its own, which waits on a dirty scheduler. Those that compute are limited in number, so
%% that the node's other work on dirty IO schedulers, files above all, goes on; further ones wait here.
-module(wasi_nn_nif_transport).
-behaviour(wasi_nn_transport).

-export([start/1, request/4, cancel/2, handle_info/2, info/1, stop/1]).

-type id() :: wasi_nn_transport:id().

%% Contexts of one session are several here, with equal keys: the graph, and the library's number.
-record(context, {resource :: wasi_nn_nif:context(), key :: {Graph :: id(), Number :: non_neg_integer()}}).
-record(job, {
    work :: fun(() -> {ok, term()} | wasi_nn_nif:failure()),
    effect :: effect(),
    %% The context that a cancel has to reach.
    context :: #context{} | undefined,
    computes :: boolean(),
    %% No other call may work on its context meanwhile.
    claims = false :: boolean(),
    is_cancelled = false :: boolean()
}).
-record(state, {
    max_running :: pos_integer(),
    max_waiting :: non_neg_integer(),
    n_computing = 0 :: non_neg_integer(),
    running = #{} :: #{id() => #job{}},
    monitors = #{} :: #{reference() => id()},
    waiting = queue:new() :: queue:queue({id(), #job{}}),
    backends = #{} :: #{id() => {wasi_nn_nif:backend(), Config :: binary()}},
    graphs = #{} :: #{id() => {wasi_nn_nif:graph(), Backend :: id()}},
    contexts = #{} :: #{id() => #context{}}
}).
%% What a result changes.
-type effect() :: fun((wasi_nn_transport:result(), #state{}) -> {wasi_nn_transport:result(), #state{}}).

-spec start(wasi_nn_transport:options()) -> {ok, #state{}} | {error, binary()}.
start(Options) ->
    case code:ensure_loaded(wasi_nn_nif) of
        {module, wasi_nn_nif} ->
            self() ! {wasi_nn_nif, ready},
            {ok, #state{max_running = max_running(Options), max_waiting = maps:get(max_waiting, Options)}};
        {error, _Reason} ->
            {error,
                <<"the NIF is not there or cannot be loaded: compile with wasi-nn in the path, or use the transport port">>}
    end.

max_running(#{nif_max_running := Number}) when is_integer(Number), Number > 0 ->
    Number;
max_running(_Options) ->
    max(1, erlang:system_info(dirty_io_schedulers) - 2).

-spec request(id(), wasi_nn_transport:operation(), [wasi_nn_transport:argument()], #state{}) -> {ok | busy, #state{}}.
request(Id, Operation, Arguments, State) ->
    case job(Operation, Arguments, Id, State) of
        {reply, Result, NewState} ->
            self() ! {wasi_nn_nif, reply, Id, Result},
            {ok, NewState};
        {#job{claims = true, context = Context} = Job, NewState} ->
            case is_claimed(Context, NewState) of
                true ->
                    Message = <<"the session is working on another call: wait for it or cancel it">>,
                    self() ! {wasi_nn_nif, reply, Id, {error, {busy, Message}}},
                    {ok, NewState};
                false ->
                    begin_job(Id, Job, NewState)
            end;
        {#job{} = Job, NewState} ->
            begin_job(Id, Job, NewState)
    end.

%% The server keeps calls on one context apart; contexts of one session are several there.
is_claimed(#context{key = Key}, #state{running = Running, waiting = Waiting}) ->
    Jobs = maps:values(Running) ++ [Job || {_Id, Job} <- queue:to_list(Waiting)],
    lists:any(fun(#job{context = Context, claims = Claims}) -> Claims andalso Context#context.key =:= Key end, Jobs).

begin_job(Id, #job{computes = false} = Job, State) ->
    {ok, run(Id, Job, State)};
begin_job(Id, Job, #state{n_computing = NComputing, max_running = Max} = State) when NComputing < Max ->
    {ok, run(Id, Job, State#state{n_computing = NComputing + 1})};
begin_job(Id, Job, #state{waiting = Waiting, max_waiting = Max} = State) ->
    case queue:len(Waiting) < Max of
        true -> {ok, State#state{waiting = queue:in({Id, Job}, Waiting)}};
        false -> {busy, State}
    end.

run(Id, #job{work = Work} = Job, #state{running = Running, monitors = Monitors} = State) ->
    Server = self(),
    {_Pid, Monitor} = spawn_monitor(fun() -> Server ! {wasi_nn_nif, done, Id, Work()} end),
    State#state{running = Running#{Id => Job}, monitors = Monitors#{Monitor => Id}}.

%% -- Operations ----------------------------------------------------------------------------------------------------

job(init_backend, [Number, Config], _Id, State) ->
    Effect = keeping(fun(Backend, #state{backends = Backends} = Now) ->
        Now#state{backends = Backends#{Number => {Backend, Config}}}
    end),
    {work(fun() -> wasi_nn_nif:open(Config) end, Effect), State};
job(deinit_backend, [Number], _Id, #state{backends = Backends, graphs = Graphs, contexts = Contexts} = State) ->
    {_Backend, _Config} = Entry = maps:get(Number, Backends),
    Gone = maps:filter(fun(_Graph, {_Resource, Owner}) -> Owner =:= Number end, Graphs),
    Resources = [element(1, Entry) | [Resource || {Resource, _Owner} <- maps:values(Gone)]],
    IsKept = fun(_Context, #context{key = {Graph, _Number}}) -> not is_map_key(Graph, Gone) end,
    Left = State#state{
        backends = maps:remove(Number, Backends),
        graphs = maps:without(maps:keys(Gone), Graphs),
        contexts = maps:filter(IsKept, Contexts)
    },
    {work(fun() -> lists:last([wasi_nn_nif:deinit(Resource) || Resource <- Resources]) end, fun unchanged/2), Left};
job(status, [_Number], _Id, State) ->
    {reply, {ok, <<"{}">>}, State};
job(load_by_name, [Backend, Number, Name, Config], _Id, #state{backends = Backends} = State) ->
    {_Resource, BackendConfig} = maps:get(Backend, Backends),
    Effect = keeping(fun(Graph, #state{graphs = Graphs} = Now) ->
        Now#state{graphs = Graphs#{Number => {Graph, Backend}}}
    end),
    Job = work(fun() -> wasi_nn_nif:load(BackendConfig, Name, Config) end, Effect),
    {Job#job{computes = true}, State};
job(unload, [Number], _Id, #state{graphs = Graphs} = State) ->
    with_resource(maps:take(Number, Graphs), State, fun({{Graph, _Backend}, Rest}) ->
        {work(fun() -> wasi_nn_nif:unload(Graph) end, fun unchanged/2), State#state{graphs = Rest}}
    end);
job(init_execution_context, [Graph, Number, SessionId], _Id, #state{graphs = Graphs} = State) ->
    with_resource(maps:find(Graph, Graphs), State, fun({ok, {Resource, _Backend}}) ->
        {work(fun() -> wasi_nn_nif:context(Resource, SessionId) end, opened(Graph, Number)), State}
    end);
job(close_execution_context, [Number], _Id, #state{contexts = Contexts} = State) ->
    with_resource(maps:take(Number, Contexts), State, fun({#context{resource = Resource}, Rest}) ->
        {work(fun() -> wasi_nn_nif:close(Resource) end, fun unchanged/2), State#state{contexts = Rest}}
    end);
job(Operation, [Number | Arguments], Id, #state{contexts = Contexts} = State) ->
    with_resource(maps:find(Number, Contexts), State, fun({ok, #context{resource = Resource} = Context}) ->
        Computes = Operation =/= set_input andalso Operation =/= get_output,
        Job = work(context_work(Operation, Resource, Arguments, Id), fun unchanged/2),
        {Job#job{context = Context, computes = Computes, claims = Operation =/= get_output}, State}
    end).

context_work(set_input, Context, [1, <<>>], Id) ->
    %% The library takes no empty input.
    context_work(set_input, Context, [1, <<"{}">>], Id);
context_work(set_input, Context, [Index, Data], _Id) ->
    fun() -> wasi_nn_nif:set_input(Context, Index, Data) end;
context_work(get_output, Context, [Index], _Id) ->
    fun() -> wasi_nn_nif:get_output(Context, Index) end;
context_work(compute, Context, [], _Id) ->
    fun() -> wasi_nn_nif:compute(Context) end;
context_work(run_inference, Context, [Prompt, Config], _Id) ->
    fun() -> wasi_nn_nif:run_inference(Context, Prompt, Config) end;
context_work(stream, Context, [Prompt, Config], Id) ->
    Server = self(),
    fun() ->
        case wasi_nn_nif:set_input(Context, 0, Prompt) of
            {ok, done} -> stream(Context, Config, Id, Server);
            Failure -> Failure
        end
    end.

stream(Context, Config, Id, Server) ->
    case wasi_nn_nif:compute_single(Context, Config) of
        {ok, <<>>} ->
            stream(Context, Config, Id, Server);
        {ok, Text} ->
            Server ! {wasi_nn_nif, token, Id, Text},
            stream(Context, Config, Id, Server);
        done ->
            wasi_nn_nif:get_output(Context, 1);
        Failure ->
            Failure
    end.

%% The library shares sessions of one name, counts their openings, and knows which of them a limit has closed.
opened(Graph, Number) ->
    fun
        ({ok, {Resource, LibraryNumber}}, #state{contexts = Contexts} = State) ->
            Context = #context{resource = Resource, key = {Graph, LibraryNumber}},
            {{ok, false}, State#state{contexts = Contexts#{Number => Context}}};
        (Failure, State) ->
            {Failure, State}
    end.

work(Work, Effect) ->
    #job{work = Work, effect = Effect, computes = false}.

unchanged(Result, State) ->
    {Result, State}.

keeping(Keep) ->
    fun
        ({ok, Resource}, State) -> {{ok, done}, Keep(Resource, State)};
        (Failure, State) -> {Failure, State}
    end.

with_resource(error, State, _Continue) ->
    {reply, {error, {invalid_argument, <<"it is closed: open it anew">>}}, State};
with_resource(Found, _State, Continue) ->
    Continue(Found).

%% -- While they run ------------------------------------------------------------------------------------------------

-spec cancel(id(), #state{}) -> #state{}.
cancel(Id, #state{running = Running, waiting = Waiting} = State) ->
    case Running of
        #{Id := #job{context = undefined}} ->
            State;
        #{Id := #job{context = #context{resource = Resource}} = Job} ->
            ok = wasi_nn_nif:cancel(Resource),
            State#state{running = Running#{Id := Job#job{is_cancelled = true}}};
        _ ->
            State#state{waiting = queue:filter(fun(Entry) -> not is_cancelled_waiting(Id, Entry) end, Waiting)}
    end.

is_cancelled_waiting(Id, {Id, _Job}) ->
    self() ! {wasi_nn_nif, reply, Id, {error, {cancelled, <<"the call was cancelled before it began">>}}},
    true;
is_cancelled_waiting(_Id, _Other) ->
    false.

-spec handle_info(term(), #state{}) -> {[wasi_nn_transport:event()], #state{}} | unknown.
handle_info({wasi_nn_nif, ready}, State) ->
    {[ready], State};
handle_info({wasi_nn_nif, token, Id, Text}, State) ->
    {[{token, Id, Text}], State};
handle_info({wasi_nn_nif, reply, Id, Result}, State) ->
    {[{reply, Id, Result}], State};
handle_info({wasi_nn_nif, done, Id, Result}, State) ->
    ended(Id, named(Result), State);
handle_info({'DOWN', Monitor, process, _Pid, Reason}, #state{monitors = Monitors} = State) ->
    case maps:take(Monitor, Monitors) of
        {_Id, Rest} when Reason =:= normal -> {[], State#state{monitors = Rest}};
        {Id, Rest} -> ended(Id, defect(Reason), State#state{monitors = Rest});
        error -> unknown
    end;
handle_info(_Message, _State) ->
    unknown.

ended(Id, Result, #state{running = Running} = State) ->
    {Job, Rest} = maps:take(Id, Running),
    #job{effect = Effect, computes = Computes, is_cancelled = IsCancelled} = Job,
    {Final, NewState} = Effect(cancelled(Result, IsCancelled), State#state{running = Rest}),
    {[{reply, Id, Final}], next(Computes, NewState)}.

%% The C library has no number for it.
cancelled({error, {runtime_error, Message}}, true) -> {error, {cancelled, Message}};
cancelled(Result, _IsCancelled) -> Result.

next(false, State) ->
    State;
next(true, #state{waiting = Waiting, n_computing = NComputing} = State) ->
    case queue:out(Waiting) of
        {{value, {Id, Job}}, Rest} -> run(Id, Job, State#state{waiting = Rest});
        {empty, _} -> State#state{n_computing = NComputing - 1}
    end.

named({error, Number, Message}) -> {error, {wasi_nn_code:from_number(Number), Message}};
named({ok, Value}) -> {ok, Value}.

defect(Reason) ->
    Text = io_lib:format("a call ended with ~0p: report it as a defect", [Reason]),
    {error, {runtime_error, unicode:characters_to_binary(Text)}}.

-spec info(#state{}) -> #{atom() => term()}.
info(#state{n_computing = NComputing, waiting = Waiting, max_running = Max}) ->
    #{n_running => NComputing, n_waiting => queue:len(Waiting), max_running => Max}.

%% In the background: a model that is being loaded cannot be hurried.
-spec stop(#state{}) -> ok.
stop(#state{running = Running, backends = Backends, graphs = Graphs}) ->
    %% A generator leaves out what does not match, such as undefined.
    _ = [wasi_nn_nif:cancel(Resource) || #job{context = #context{resource = Resource}} <- maps:values(Running)],
    Resources = [Backend || {Backend, _Config} <- maps:values(Backends)] ++ [Graph || {Graph, _} <- maps:values(Graphs)],
    _ = spawn(fun() -> [wasi_nn_nif:deinit(Resource) || Resource <- Resources] end),
    ok.
