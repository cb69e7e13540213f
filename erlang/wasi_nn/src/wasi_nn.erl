%% @doc Large language models through WASI-NN: load a model, make execution contexts on it, ask them.
%%
%% ```
%% {ok, _} = application:ensure_all_started(wasi_nn),
%% {ok, Backend} = wasi_nn:init_backend(#{temperature => 0}),
%% {ok, Model} = wasi_nn:load_by_name(Backend, "model.gguf"),
%% {ok, Chat} = wasi_nn:init_execution_context(Backend, Model),
%% {ok, Answer} = wasi_nn:run_inference(Backend, Chat, <<"Name the capital city of France.">>).
%% '''
%%
%% Every call waits for its result, as long as it takes: the configuration's `default_task_timeout_ms' (30 s) ends what
%% takes too long. Only the caller waits. An execution context takes one call at a time (a second one is `busy'), except
%% {@link cancel/1}, {@link get_output/3} and {@link close_execution_context/2}. It belongs to the process that made it,
%% and is closed when that process ends; others may use it meanwhile. A process that ends while it waits for a call has
%% that call cancelled. Backends and graphs are everyone's, and stay until they are closed.
-module(wasi_nn).

-export([init_backend/0, init_backend/1, deinit_backend/1, status/1]).
-export([load_by_name/2, load_by_name_with_config/3, latest_graph/1, unload/2]).
-export([init_execution_context/2, init_execution_context_with_session_id/3, close_execution_context/2]).
-export([set_input/4, compute/2, get_output/3, run_inference/3, run_inference/4]).
-export([stream/3, stream/4, cancel/1]).

-export_type([backend/0, graph/0, execution_context/0, stream/0]).
-export_type([config/0, text/0, index/0, reason/0, result/1, stream_message/0]).

%% As at the C door. A packet has room for both.
-define(N_TEXT_BYTES_MAX, 16#4000000).
-define(N_CONFIG_BYTES_MAX, 16#100000).
-define(N_NAME_BYTES_MAX, 4095).
-define(N_NAME_PART_BYTES_MAX, 255).
-define(N_SESSION_ID_BYTES_MAX, 255).

-opaque backend() :: {wasi_nn_backend, pos_integer()}.
-opaque graph() :: {wasi_nn_graph, pos_integer()}.
-opaque execution_context() :: {wasi_nn_context, pos_integer()}.
-type stream() :: reference().

%% Keys as in docs/configuration.md, or the text of a JSON object; an empty one changes nothing.
-type config() :: #{atom() | binary() => wasi_nn_json:json()} | text().
%% Bytes, or a string of characters.
-type text() :: binary() | string().
%% Inputs: 0 is the prompt, 1 configuration JSON. Outputs: 0 is the text, 1 metadata JSON.
-type index() :: 0 | 1.
-type reason() :: {wasi_nn_code:code(), Message :: binary()}.
-type result(Value) :: {ok, Value} | {error, reason()}.
%% What the process that called {@link stream/4} receives: tokens, then one of the others.
-type stream_message() ::
    {wasi_nn, stream(), {token, binary()}}
    | {wasi_nn, stream(), {done, Metadata :: #{binary() => term()}}}
    | {wasi_nn, stream(), {error, reason()}}.

%% @equiv init_backend(#{})
-spec init_backend() -> result(backend()).
init_backend() ->
    init_backend(#{}).

%% @doc Open a backend. `Config' lies under everything that graphs and calls bring.
-spec init_backend(config()) -> result(backend()).
init_backend(Config) ->
    with_config(Config, fun(Json) -> handle(wasi_nn_backend, {init_backend, Json}) end).

%% @doc Close a backend with its graphs and contexts; calls under way are cancelled.
-spec deinit_backend(backend()) -> result(done).
deinit_backend({wasi_nn_backend, Backend}) ->
    wasi_nn_server:call({deinit_backend, Backend});
deinit_backend(_Other) ->
    wrong_handle().

%% @doc What is going on: the transport, its state, how often it was started again, and, under `backend', what the
%% backend has loaded and who waits (with the transport `port').
-spec status(backend()) -> result(#{atom() => term()}).
status({wasi_nn_backend, Backend}) ->
    wasi_nn_server:call({status, Backend});
status(_Other) ->
    wrong_handle().

%% @equiv load_by_name_with_config(Backend, Name, #{})
-spec load_by_name(backend(), text()) -> result(graph()).
load_by_name(Backend, Name) ->
    load_by_name_with_config(Backend, Name, #{}).

%% @doc Load a model: the path of a GGUF file, or a built-in model's name.
-spec load_by_name_with_config(backend(), text(), config()) -> result(graph()).
load_by_name_with_config({wasi_nn_backend, Backend}, Name, Config) ->
    with_name(Name, fun(Text) ->
        with_config(Config, fun(Json) -> handle(wasi_nn_graph, {load_by_name, Backend, Text, Json}) end)
    end);
load_by_name_with_config(_Other, _Name, _Config) ->
    wrong_handle().

%% @doc The graph that was loaded last on a backend, for callers who keep only the backend.
-spec latest_graph(backend()) -> result(graph()).
latest_graph({wasi_nn_backend, Backend}) ->
    handle(wasi_nn_graph, {latest_graph, Backend});
latest_graph(_Other) ->
    wrong_handle().

%% @doc Unload a graph. Running calls finish; its contexts can still be read and closed.
-spec unload(backend(), graph()) -> result(done).
unload({wasi_nn_backend, Backend}, {wasi_nn_graph, Graph}) ->
    wasi_nn_server:call({unload, Backend, Graph});
unload(_Backend, _Graph) ->
    wrong_handle().

%% @doc A context of its own, which remembers its conversation until it is closed. The calling process owns it.
-spec init_execution_context(backend(), graph()) -> result(execution_context()).
init_execution_context(Backend, Graph) ->
    new_context(Backend, Graph, <<>>).

%% @doc The session of a name: contexts of equal names on a graph share one conversation, which ends when the last one
%% is closed. With `save_dir' in the backend's configuration it goes on from its last finished turn. When a limit has
%% closed it, calls on its contexts are `invalid_argument', and the next one of that name begins anew.
-spec init_execution_context_with_session_id(backend(), graph(), text()) -> result(execution_context()).
init_execution_context_with_session_id(Backend, Graph, SessionId) ->
    with_session_id(SessionId, fun(Text) -> new_context(Backend, Graph, Text) end).

%% @doc Close a context; what runs in it is cancelled first.
-spec close_execution_context(backend(), execution_context()) -> result(done).
close_execution_context({wasi_nn_backend, Backend}, {wasi_nn_context, Context}) ->
    wasi_nn_server:call({close_execution_context, Backend, Context});
close_execution_context(_Backend, _Context) ->
    wrong_handle().

%% @doc Set the prompt (index 0), or configuration for this context (index 1; `Data' may be a map then).
-spec set_input(backend(), execution_context(), index(), text() | config()) -> result(done).
set_input({wasi_nn_backend, Backend}, {wasi_nn_context, Context}, 1, Config) ->
    with_config(Config, fun(Json) -> wasi_nn_server:call({set_input, Backend, Context, 1, Json}) end);
set_input({wasi_nn_backend, Backend}, {wasi_nn_context, Context}, 0, Prompt) when not is_map(Prompt) ->
    with_prompt(Prompt, fun(Text) -> wasi_nn_server:call({set_input, Backend, Context, 0, Text}) end);
set_input({wasi_nn_backend, _Backend}, {wasi_nn_context, _Context}, _Index, _Data) ->
    invalid(<<"set_input takes index 0 with a prompt, or index 1 with configuration">>);
set_input(_Backend, _Context, _Index, _Data) ->
    wrong_handle().

%% @doc Generate the answer to the prompt that was set.
-spec compute(backend(), execution_context()) -> result(done).
compute({wasi_nn_backend, Backend}, {wasi_nn_context, Context}) ->
    wasi_nn_server:call({compute, Backend, Context});
compute(_Backend, _Context) ->
    wrong_handle().

%% @doc The text of the last run (index 0), or its metadata as JSON (index 1).
-spec get_output(backend(), execution_context(), index()) -> result(binary()).
get_output({wasi_nn_backend, Backend}, {wasi_nn_context, Context}, Index) when Index =:= 0; Index =:= 1 ->
    wasi_nn_server:call({get_output, Backend, Context, Index});
get_output({wasi_nn_backend, _Backend}, {wasi_nn_context, _Context}, _Index) ->
    invalid(<<"get_output takes index 0, the text, or 1, the metadata">>);
get_output(_Backend, _Context, _Index) ->
    wrong_handle().

%% @equiv run_inference(Backend, Context, Prompt, #{})
-spec run_inference(backend(), execution_context(), text()) -> result(binary()).
run_inference(Backend, Context, Prompt) ->
    run_inference(Backend, Context, Prompt, #{}).

%% @doc The answer to a prompt: set_input, compute and get_output in one. `Config' holds for this call only.
-spec run_inference(backend(), execution_context(), text(), config()) -> result(binary()).
run_inference(Backend, Context, Prompt, Config) ->
    ask(run_inference, Backend, Context, Prompt, Config).

%% @equiv stream(Backend, Context, Prompt, #{})
-spec stream(backend(), execution_context(), text()) -> result(stream()).
stream(Backend, Context, Prompt) ->
    stream(Backend, Context, Prompt, #{}).

%% @doc {@link run_inference/4} in pieces: returns at once, and the calling process receives
%% {@type stream_message()}s. The tokens joined are the text.
-spec stream(backend(), execution_context(), text(), config()) -> result(stream()).
stream(Backend, Context, Prompt, Config) ->
    ask(stream, Backend, Context, Prompt, Config).

%% @doc Stop a stream, or what runs in a context. Whoever waits for it gets the error `cancelled', soon after;
%% `idle': there was nothing to stop.
-spec cancel(stream() | execution_context()) -> result(cancelled | idle).
cancel(Stream) when is_reference(Stream) ->
    wasi_nn_server:call({cancel, Stream});
cancel({wasi_nn_context, Context}) ->
    wasi_nn_server:call({cancel, Context});
cancel(_Other) ->
    wrong_handle().

%% -- Inside --------------------------------------------------------------------------------------------------------

new_context({wasi_nn_backend, Backend}, {wasi_nn_graph, Graph}, SessionId) ->
    handle(wasi_nn_context, {init_execution_context, Backend, Graph, SessionId});
new_context(_Backend, _Graph, _SessionId) ->
    wrong_handle().

ask(Operation, {wasi_nn_backend, Backend}, {wasi_nn_context, Context}, Prompt, Config) ->
    with_prompt(Prompt, fun(Text) ->
        with_config(Config, fun(Json) -> wasi_nn_server:call({Operation, Backend, Context, Text, Json}) end)
    end);
ask(_Operation, _Backend, _Context, _Prompt, _Config) ->
    wrong_handle().

handle(Kind, Request) ->
    case wasi_nn_server:call(Request) of
        {ok, Number} -> {ok, {Kind, Number}};
        {error, Reason} -> {error, Reason}
    end.

with_prompt(Prompt, Continue) ->
    with_text(Prompt, fun
        (<<>>) -> invalid(<<"the prompt is empty: write a text">>);
        (Text) -> Continue(Text)
    end).

%% What the system can open. Checked here, so that no transport finds out in its own way.
with_name(Name, Continue) ->
    with_text(Name, fun(Text) ->
        LongParts = [Part || Part <- binary:split(Text, <<"/">>, [global]), byte_size(Part) > ?N_NAME_PART_BYTES_MAX],
        case {Text, has_nul(Text)} of
            {<<>>, _} -> invalid(<<"the model's name is empty: pass its path or a built-in model's name">>);
            {_, true} -> invalid(<<"the model's name has a NUL inside: pass a path without">>);
            _ when byte_size(Text) > ?N_NAME_BYTES_MAX; LongParts =/= [] ->
                invalid(<<"the model's name has more than 4095 bytes, or a part of it more than 255: shorten it">>);
            _ -> Continue(Text)
        end
    end).

with_session_id(SessionId, Continue) ->
    with_text(SessionId, fun(Text) ->
        case byte_size(Text) > ?N_SESSION_ID_BYTES_MAX orelse has_nul(Text) of
            true -> invalid(<<"a session id has at most 255 bytes and no NUL: choose another">>);
            false -> Continue(Text)
        end
    end).

has_nul(Text) ->
    binary:match(Text, <<0>>) =/= nomatch.

with_text(Text, _Continue) when is_binary(Text), byte_size(Text) > ?N_TEXT_BYTES_MAX ->
    too_large(<<"a text has more than 64 MiB: send less">>);
with_text(Text, Continue) when is_binary(Text) ->
    Continue(Text);
with_text(Text, Continue) when is_list(Text) ->
    try unicode:characters_to_binary(Text) of
        Binary when is_binary(Binary) -> with_text(Binary, Continue);
        _NoCharacters -> no_text()
    catch
        error:badarg -> no_text()
    end;
with_text(_Other, _Continue) ->
    no_text().

with_config(Config, Continue) when is_map(Config), map_size(Config) =:= 0 ->
    Continue(<<>>);
with_config(Config, Continue) when is_map(Config) ->
    case wasi_nn_json:encode(Config) of
        {ok, Json} -> with_json(Json, Continue);
        error -> invalid(<<"the configuration has a part that JSON has not: strings are binaries, UTF-8">>)
    end;
with_config(Config, Continue) ->
    with_text(Config, fun(Json) -> with_json(Json, Continue) end).

with_json(Json, Continue) when byte_size(Json) =< ?N_CONFIG_BYTES_MAX ->
    case has_nul(Json) of
        true -> invalid(<<"the configuration has a NUL inside: JSON writes it as \\u0000">>);
        false -> Continue(Json)
    end;
with_json(_Json, _Continue) ->
    too_large(<<"the configuration has more than 1 MiB: send less">>).

no_text() ->
    invalid(<<"a text is a binary or a string of characters">>).

wrong_handle() ->
    invalid(<<"a handle is none that wasi_nn has given out, or of another kind">>).

too_large(Message) ->
    {error, {too_large, Message}}.

invalid(Message) ->
    {error, {invalid_argument, Message}}.
