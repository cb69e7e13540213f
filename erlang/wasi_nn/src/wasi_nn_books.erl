%% @doc What is open on the other side: backends, their graphs, the graphs' contexts. Pure.
%%
%% From it everything can be opened again when the other side is replaced. A context whose conversation is lost then
%% is `restarted': its next user is told so, once, and goes on with an empty one.
-module(wasi_nn_books).

-export([new/0, add_backend/3, add_graph/5, add_context/5]).
-export([has_backend/2, has_graph/2, check_graph/3, latest_graph/2, backend_of/2, counts/1]).
-export([remove_backend/2, remove_graph/2, remove_context/2]).
-export([enter/5, leave/4, active_call/2, replaced/1, to_restore/2, saved/3]).
-export_type([books/0, stage/0]).

-type id() :: wasi_nn_transport:id().
-type stage() :: backends | graphs | contexts.

-record(graph, {backend :: id(), name :: binary(), config :: binary()}).
-record(context, {
    backend :: id(),
    graph :: id(),
    session_id :: binary(),
    %% Whether finished turns are kept on disk.
    is_saved :: boolean(),
    is_used = false :: boolean(),
    has_input = false :: boolean(),
    is_lost = false :: boolean(),
    active :: id() | undefined
}).
-record(books, {
    backends = #{} :: #{id() => binary()},
    graphs = #{} :: #{id() => #graph{}},
    contexts = #{} :: #{id() => #context{}}
}).
-opaque books() :: #books{}.

-spec new() -> books().
new() ->
    #books{}.

-spec add_backend(id(), binary(), books()) -> books().
add_backend(Id, Config, #books{backends = Backends} = Books) ->
    Books#books{backends = Backends#{Id => Config}}.

-spec add_graph(id(), id(), binary(), binary(), books()) -> books().
add_graph(Id, Backend, Name, Config, #books{graphs = Graphs} = Books) ->
    Books#books{graphs = Graphs#{Id => #graph{backend = Backend, name = Name, config = Config}}}.

-spec add_context(id(), id(), binary(), boolean(), books()) -> books().
add_context(Id, Graph, SessionId, IsSaved, #books{graphs = Graphs, contexts = Contexts} = Books) ->
    #graph{backend = Backend} = maps:get(Graph, Graphs),
    Context = #context{backend = Backend, graph = Graph, session_id = SessionId, is_saved = IsSaved},
    Books#books{contexts = Contexts#{Id => Context}}.

-spec has_backend(id(), books()) -> boolean().
has_backend(Id, #books{backends = Backends}) ->
    is_map_key(Id, Backends).

-spec has_graph(id(), books()) -> boolean().
has_graph(Id, #books{graphs = Graphs}) ->
    is_map_key(Id, Graphs).

%% @doc Whether a graph is open on this backend.
-spec check_graph(id(), id(), books()) -> ok | {error, wasi_nn:reason()}.
check_graph(Backend, Graph, #books{graphs = Graphs}) ->
    case Graphs of
        #{Graph := #graph{backend = Backend}} -> ok;
        _ -> {error, {invalid_argument, <<"the graph is unloaded, or is another backend's: load the model">>}}
    end.

%% @doc The graph that was loaded last on a backend.
-spec latest_graph(id(), books()) -> {ok, id()} | error.
latest_graph(Backend, #books{graphs = Graphs}) ->
    case [Id || {Id, #graph{backend = Owner}} <- maps:to_list(Graphs), Owner =:= Backend] of
        [] -> error;
        Ids -> {ok, lists:max(Ids)}
    end.

%% @doc The backend that a context is on.
-spec backend_of(id(), books()) -> {ok, id()} | error.
backend_of(Id, #books{contexts = Contexts}) ->
    case Contexts of
        #{Id := #context{backend = Backend}} -> {ok, Backend};
        _ -> error
    end.

-spec counts(books()) -> #{atom() => non_neg_integer()}.
counts(#books{backends = Backends, graphs = Graphs, contexts = Contexts}) ->
    #{n_backends => map_size(Backends), n_graphs => map_size(Graphs), n_contexts => map_size(Contexts)}.

%% @doc Without a backend and what is on it; also the numbers of its contexts.
-spec remove_backend(id(), books()) -> {[id()], books()}.
remove_backend(Backend, #books{backends = Backends, graphs = Graphs, contexts = Contexts} = Books) ->
    Gone = [Id || {Id, #context{backend = Owner}} <- maps:to_list(Contexts), Owner =:= Backend],
    {Gone, Books#books{
        backends = maps:remove(Backend, Backends),
        graphs = maps:filter(fun(_Id, #graph{backend = Owner}) -> Owner =/= Backend end, Graphs),
        contexts = maps:without(Gone, Contexts)
    }}.

%% @doc Without a graph. Its contexts stay: they can be read and closed.
-spec remove_graph(id(), books()) -> books().
remove_graph(Graph, #books{graphs = Graphs} = Books) ->
    Books#books{graphs = maps:remove(Graph, Graphs)}.

-spec remove_context(id(), books()) -> books().
remove_context(Id, #books{contexts = Contexts} = Books) ->
    Books#books{contexts = maps:remove(Id, Contexts)}.

%% @doc A call on a context begins. Calls that work on it come one at a time.
-spec enter(id(), id(), id(), wasi_nn_transport:operation(), books()) -> {ok, books()} | {error, wasi_nn:reason(), books()}.
enter(Backend, Id, Call, Operation, #books{contexts = Contexts} = Books) ->
    case Contexts of
        #{Id := #context{backend = Backend, is_lost = true} = Context} ->
            Message =
                <<"the other side was started again and the conversation is lost: call again to begin a new one">>,
            {error, {restarted, Message}, put_context(Id, Context#context{is_lost = false}, Books)};
        #{Id := #context{backend = Backend} = Context} ->
            begin_call(Id, Context, Call, Operation, Books);
        _ ->
            {error, {invalid_argument, <<"the execution context is closed, or is another backend's">>}, Books}
    end.

begin_call(_Id, _Context, _Call, get_output, Books) ->
    {ok, Books};
begin_call(_Id, #context{active = Other}, _Call, _Operation, Books) when Other =/= undefined ->
    {error, {busy, <<"the execution context is working on another call: wait for it or cancel it">>}, Books};
begin_call(Id, Context, Call, Operation, Books) ->
    HasInput = Operation =:= set_input orelse Context#context.has_input,
    {ok, put_context(Id, Context#context{active = Call, is_used = true, has_input = HasInput}, Books)}.

%% @doc A call on a context has ended.
-spec leave(id(), id(), wasi_nn_transport:operation(), books()) -> books().
leave(Id, Call, Operation, #books{contexts = Contexts} = Books) ->
    case Contexts of
        #{Id := #context{active = Call} = Context} ->
            HasInput = Operation =:= set_input andalso Context#context.has_input,
            put_context(Id, Context#context{active = undefined, has_input = HasInput}, Books);
        _ ->
            Books
    end.

-spec active_call(id(), books()) -> {ok, id()} | error.
active_call(Id, #books{contexts = Contexts}) ->
    case Contexts of
        #{Id := #context{active = Call}} when Call =/= undefined -> {ok, Call};
        _ -> error
    end.

%% @doc The other side is gone. Callers inside are told by the answer to their call; whoever else used a context whose
%% conversation is not on disk is told by the next one. A prompt that waits is on no disk.
-spec replaced(books()) -> books().
replaced(#books{contexts = Contexts} = Books) ->
    Books#books{contexts = maps:map(fun(_Id, Context) -> replaced_context(Context) end, Contexts)}.

replaced_context(#context{active = Call} = Context) when Call =/= undefined ->
    Context#context{active = undefined, is_used = false, has_input = false};
replaced_context(#context{is_used = IsUsed, is_saved = IsSaved, has_input = HasInput, is_lost = IsLost} = Context) ->
    IsLostNow = IsLost orelse (IsUsed andalso (HasInput orelse not IsSaved)),
    Context#context{is_lost = IsLostNow, is_used = IsSaved andalso IsUsed, has_input = false}.

%% @doc The requests that open everything of one stage again.
-spec to_restore(stage(), books()) -> [{id(), wasi_nn_transport:operation(), [wasi_nn_transport:argument()]}].
to_restore(backends, #books{backends = Backends}) ->
    [{Id, init_backend, [Id, Config]} || {Id, Config} <- maps:to_list(Backends)];
to_restore(graphs, #books{graphs = Graphs}) ->
    [
        {Id, load_by_name, [Backend, Id, Name, Config]}
     || {Id, #graph{backend = Backend, name = Name, config = Config}} <- maps:to_list(Graphs)
    ];
to_restore(contexts, #books{graphs = Graphs, contexts = Contexts}) ->
    [
        {Id, init_execution_context, [Graph, Id, SessionId]}
     || {Id, #context{graph = Graph, session_id = SessionId}} <- maps:to_list(Contexts), is_map_key(Graph, Graphs)
    ].

%% @doc Note whether a context's turns are kept on disk.
-spec saved(id(), boolean(), books()) -> books().
saved(Id, IsSaved, #books{contexts = Contexts} = Books) ->
    case Contexts of
        #{Id := Context} -> put_context(Id, Context#context{is_saved = IsSaved}, Books);
        _ -> Books
    end.

put_context(Id, Context, #books{contexts = Contexts} = Books) ->
    Books#books{contexts = Contexts#{Id => Context}}.
