%% What both transports promise, with a tiny model.
-module(wasi_nn_SUITE).
-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

suite() ->
    [{timetrap, {seconds, 120}}].

all() ->
    [{group, port}, {group, nif}].

groups() ->
    [{port, [], cases()}, {nif, [], cases()}].

cases() ->
    [
        one_call_is_the_same_as_three,
        a_context_remembers,
        tokens_joined_are_the_text,
        the_first_token_comes_before_the_last_is_computed,
        configuration_of_a_stream_is_its_own,
        a_stream_is_cancelled,
        a_waiting_call_is_cancelled_through_its_context,
        a_context_takes_one_call_at_a_time,
        a_session_takes_one_call_at_a_time,
        too_many_calls_are_busy,
        a_dead_caller_leaves_nothing,
        another_process_may_use_a_context,
        sessions_are_shared_by_name,
        sessions_belong_to_their_graph,
        a_session_that_a_limit_closed_is_opened_anew,
        contexts_are_closed_through_their_backend,
        closed_things_are_errors,
        deinit_ends_what_runs,
        wrong_arguments_are_errors,
        configuration_is_a_map_or_json,
        empty_configuration_changes_nothing,
        no_atom_comes_from_input,
        calls_of_many_processes_do_not_mix,
        a_server_that_dies_is_replaced,
        a_chat_server,
        a_chat_server_goes_on_after_a_limit,
        a_chat_server_keeps_the_conversation_after_a_wrong_message,
        a_device_of_hyperbeam,
        a_device_goes_on_after_a_limit,
        a_device_leaves_running_calls_alone
    ].

init_per_group(Transport, Config) ->
    ok = wasi_nn_test:start(Transport, [{nif_max_running, 4}, {max_waiting, 30}]),
    [{transport, Transport} | Config].

end_per_group(_Transport, _Config) ->
    wasi_nn_test:stop().

init_per_testcase(_Case, Config) ->
    {ok, Backend} = wasi_nn:init_backend(wasi_nn_test:config()),
    {ok, Graph} = wasi_nn:load_by_name(Backend, wasi_nn_test:tiny_model()),
    [{backend, Backend}, {graph, Graph} | Config].

end_per_testcase(_Case, Config) ->
    _ = wasi_nn:deinit_backend(?config(backend, Config)),
    ok.

context(Config) ->
    {ok, Context} = wasi_nn:init_execution_context(?config(backend, Config), ?config(graph, Config)),
    Context.

one_call_is_the_same_as_three(Config) ->
    Backend = ?config(backend, Config),
    [First, Second] = [context(Config), context(Config)],
    {ok, Text} = wasi_nn:run_inference(Backend, First, "hello"),
    {ok, done} = wasi_nn:set_input(Backend, Second, 0, <<"hello">>),
    {ok, done} = wasi_nn:compute(Backend, Second),
    ?assertEqual({ok, Text}, wasi_nn:get_output(Backend, Second, 0)),
    {ok, Metadata} = wasi_nn:get_output(Backend, Second, 1),
    {ok, #{<<"output_tokens">> := 16}} = wasi_nn_json:decode(Metadata).

a_context_remembers(Config) ->
    Backend = ?config(backend, Config),
    Context = context(Config),
    NTokens = fun() ->
        {ok, _} = wasi_nn:run_inference(Backend, Context, "hello"),
        {ok, Metadata} = wasi_nn:get_output(Backend, Context, 1),
        {ok, #{<<"input_tokens">> := N}} = wasi_nn_json:decode(Metadata),
        N
    end,
    First = NTokens(),
    ?assert(NTokens() > First + 16).

tokens_joined_are_the_text(Config) ->
    Backend = ?config(backend, Config),
    {ok, Text} = wasi_nn:run_inference(Backend, context(Config), "hello"),
    {ok, Stream} = wasi_nn:stream(Backend, context(Config), "hello"),
    {Tokens, {done, Metadata}} = wasi_nn_test:collect(Stream),
    ?assert(length(Tokens) > 8),
    ?assertEqual(Text, iolist_to_binary(Tokens)),
    ?assertMatch(#{<<"finish_reason">> := <<"length">>, <<"output_tokens">> := 16}, Metadata).

%% A stream that would compute a million tokens has sent some, and is under way.
the_first_token_comes_before_the_last_is_computed(Config) ->
    Backend = ?config(backend, Config),
    {ok, Stream} = wasi_nn:stream(Backend, context(Config), "hello", wasi_nn_test:endless()),
    _ = wasi_nn_test:first_token(Stream),
    ?assertEqual({ok, cancelled}, wasi_nn:cancel(Stream)),
    {_Tokens, End} = wasi_nn_test:collect(Stream),
    ?assertMatch({error, {cancelled, _}}, End).

configuration_of_a_stream_is_its_own(Config) ->
    Backend = ?config(backend, Config),
    Context = context(Config),
    NTokens = fun(StreamConfig) ->
        {ok, Stream} = wasi_nn:stream(Backend, Context, "hello", StreamConfig),
        {_Tokens, {done, #{<<"output_tokens">> := N}}} = wasi_nn_test:collect(Stream),
        N
    end,
    ?assertEqual([3, 16, 5], [NTokens(#{max_tokens => 3}), NTokens(#{}), NTokens("{\"max_tokens\": 5}")]).

a_stream_is_cancelled(Config) ->
    Backend = ?config(backend, Config),
    Context = context(Config),
    {ok, Stream} = wasi_nn:stream(Backend, Context, "hello", wasi_nn_test:endless()),
    {ok, cancelled} = wasi_nn:cancel(Stream),
    ?assertMatch({_, {error, {cancelled, _}}}, wasi_nn_test:collect(Stream)),
    ?assertEqual({ok, idle}, wasi_nn:cancel(Stream)),
    ?assertMatch({ok, _}, wasi_nn:run_inference(Backend, Context, "hello")).

a_waiting_call_is_cancelled_through_its_context(Config) ->
    Backend = ?config(backend, Config),
    Context = context(Config),
    ?assertEqual({ok, idle}, wasi_nn:cancel(Context)),
    Self = self(),
    _ = spawn_link(fun() ->
        Self ! {answer, wasi_nn:run_inference(Backend, Context, "hello", wasi_nn_test:endless())}
    end),
    wasi_nn_test:wait_until(running, fun() -> wasi_nn:cancel(Context) =:= {ok, cancelled} end),
    receive
        {answer, Answer} -> ?assertMatch({error, {cancelled, _}}, Answer)
    end.

a_context_takes_one_call_at_a_time(Config) ->
    Backend = ?config(backend, Config),
    Context = context(Config),
    {ok, Stream} = wasi_nn:stream(Backend, Context, "hello", wasi_nn_test:endless()),
    ?assertMatch({error, {busy, _}}, wasi_nn:run_inference(Backend, Context, "me too")),
    ?assertMatch({error, {busy, _}}, wasi_nn:set_input(Backend, Context, 0, "me too")),
    ?assertMatch({ok, _}, wasi_nn:get_output(Backend, Context, 0)),
    {ok, cancelled} = wasi_nn:cancel(Stream),
    _ = wasi_nn_test:collect(Stream).

%% Also between the tokens of a stream.
a_session_takes_one_call_at_a_time(Config) ->
    Backend = ?config(backend, Config),
    [First, Second] = [
        begin
            {ok, Context} = wasi_nn:init_execution_context_with_session_id(Backend, ?config(graph, Config), "ada"),
            Context
        end
     || _ <- [1, 2]
    ],
    {ok, Stream} = wasi_nn:stream(Backend, First, "hello", wasi_nn_test:endless()),
    _ = wasi_nn_test:first_token(Stream),
    _ = [?assertMatch({error, {busy, _}}, wasi_nn:run_inference(Backend, Second, "me too")) || _ <- lists:seq(1, 20)],
    ?assertEqual({ok, idle}, wasi_nn:cancel(Second)),
    {ok, cancelled} = wasi_nn:cancel(Stream),
    _ = wasi_nn_test:collect(Stream),
    ?assertMatch({ok, _}, wasi_nn:run_inference(Backend, Second, "me too")).

%% The backend's queue says so, or the NIF's (see init_per_group/2).
too_many_calls_are_busy(Config) ->
    Queue =
        case ?config(transport, Config) of
            port -> #{max_concurrent => 1, queue_size => 2, queue_warning_threshold => 2, queue_reject_threshold => 2};
            nif -> #{}
        end,
    {ok, Backend} = wasi_nn:init_backend(maps:merge(wasi_nn_test:config(), Queue)),
    {ok, Graph} = wasi_nn:load_by_name(Backend, wasi_nn_test:tiny_model()),
    Streams = [
        begin
            {ok, Context} = wasi_nn:init_execution_context(Backend, Graph),
            {ok, Stream} = wasi_nn:stream(Backend, Context, "hello", wasi_nn_test:endless()),
            Stream
        end
     || _ <- lists:seq(1, 40)
    ],
    receive
        {wasi_nn, _Stream, {error, Reason}} -> ?assertMatch({busy, _}, Reason)
    end,
    _ = [wasi_nn:cancel(Stream) || Stream <- Streams],
    {ok, done} = wasi_nn:deinit_backend(Backend).

a_dead_caller_leaves_nothing(Config) ->
    Backend = ?config(backend, Config),
    Self = self(),
    Callers = [
        spawn(fun() ->
            Context = context(Config),
            Self ! {self(), Context},
            wasi_nn:run_inference(Backend, Context, "hello", wasi_nn_test:endless())
        end)
     || _ <- lists:seq(1, 6)
    ],
    Contexts = [
        receive
            {Caller, Context} -> Context
        end
     || Caller <- Callers
    ],
    wasi_nn_test:wait_until(running, fun() -> count(n_calls, Backend) >= length(Callers) end),
    _ = [exit(Caller, kill) || Caller <- Callers],
    wasi_nn_test:wait_until(cancelled, fun() -> count(n_calls, Backend) =:= 0 end),
    ?assertEqual(0, count(n_contexts, Backend)),
    _ = [
        ?assertMatch({error, {invalid_argument, _}}, wasi_nn:get_output(Backend, Context, 0))
     || Context <- Contexts
    ],
    ?assertMatch({ok, _}, wasi_nn:run_inference(Backend, context(Config), "hello")).

count(What, Backend) ->
    {ok, #{What := N}} = wasi_nn:status(Backend),
    N.

another_process_may_use_a_context(Config) ->
    Backend = ?config(backend, Config),
    Context = context(Config),
    {_, Monitor} = spawn_monitor(fun() -> exit(wasi_nn:run_inference(Backend, Context, "hello")) end),
    receive
        {'DOWN', Monitor, process, _, Answer} -> ?assertMatch({ok, _}, Answer)
    end,
    ?assertMatch({ok, _}, wasi_nn:get_output(Backend, Context, 0)).

sessions_are_shared_by_name(Config) ->
    Backend = ?config(backend, Config),
    Open = fun() ->
        {ok, Context} = wasi_nn:init_execution_context_with_session_id(Backend, ?config(graph, Config), "ada"),
        Context
    end,
    Parent = self(),
    Openers = [spawn_link(fun() -> Parent ! {opened, Open()}, receive stop -> ok end end) || _ <- lists:seq(1, 5)],
    [First | Others] = [receive {opened, Context} -> Context end || _ <- Openers],
    {ok, Text} = wasi_nn:run_inference(Backend, First, "hello"),
    _ = [?assertEqual({ok, Text}, wasi_nn:get_output(Backend, Other, 0)) || Other <- Others],
    {ok, done} = wasi_nn:close_execution_context(Backend, First),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn:get_output(Backend, First, 0)),
    ?assertEqual({ok, Text}, wasi_nn:get_output(Backend, hd(Others), 0)),
    _ = [Opener ! stop || Opener <- Openers],
    wasi_nn_test:wait_until(closed, fun() -> count(n_contexts, Backend) =:= 0 end),
    ?assertEqual({ok, <<>>}, wasi_nn:get_output(Backend, Open(), 0)).

sessions_belong_to_their_graph(Config) ->
    Backend = ?config(backend, Config),
    {ok, Other} = wasi_nn:load_by_name(Backend, wasi_nn_test:tiny_model()),
    [First, Second] = [
        begin
            {ok, Context} = wasi_nn:init_execution_context_with_session_id(Backend, Graph, "ada"),
            Context
        end
     || Graph <- [?config(graph, Config), Other]
    ],
    {ok, _} = wasi_nn:run_inference(Backend, First, "hello"),
    ?assertEqual({ok, <<>>}, wasi_nn:get_output(Backend, Second, 0)),
    ?assertEqual({ok, Other}, wasi_nn:latest_graph(Backend)).

%% With room for one session, the next one's opening closes it.
a_session_that_a_limit_closed_is_opened_anew(_Config) ->
    {ok, Backend} = wasi_nn:init_backend((wasi_nn_test:config())#{max_sessions => 1}),
    {ok, Graph} = wasi_nn:load_by_name(Backend, wasi_nn_test:tiny_model()),
    Open = fun(Name) ->
        {ok, Context} = wasi_nn:init_execution_context_with_session_id(Backend, Graph, Name),
        Context
    end,
    Ask = fun(Context) -> wasi_nn:run_inference(Backend, Context, "hello") end,
    Old = Open("ada"),
    {ok, Text} = Ask(Old),
    {ok, _} = Ask(Open("bob")),
    ?assertMatch({error, {invalid_argument, _}}, Ask(Old)),
    [New, Other] = [Open("ada"), Open("ada")],
    ?assertEqual({ok, Text}, Ask(New)),
    {ok, Stream} = wasi_nn:stream(Backend, New, "hello", wasi_nn_test:endless()),
    _ = wasi_nn_test:first_token(Stream),
    ?assertMatch({error, {invalid_argument, _}}, Ask(Old)),
    ?assertMatch({error, {busy, _}}, Ask(Other)),
    {ok, cancelled} = wasi_nn:cancel(Stream),
    _ = wasi_nn_test:collect(Stream),
    ?assertEqual({ok, Text}, wasi_nn:get_output(Backend, Old, 0)),
    {ok, done} = wasi_nn:close_execution_context(Backend, Old),
    {ok, done} = wasi_nn:close_execution_context(Backend, New),
    ?assertMatch({ok, _}, Ask(Other)),
    {ok, done} = wasi_nn:close_execution_context(Backend, Other),
    ?assertEqual({ok, <<>>}, wasi_nn:get_output(Backend, Open("ada"), 0)),
    {ok, done} = wasi_nn:deinit_backend(Backend).

contexts_are_closed_through_their_backend(Config) ->
    Backend = ?config(backend, Config),
    Context = context(Config),
    {ok, Other} = wasi_nn:init_backend(),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn:close_execution_context(Other, Context)),
    ?assertMatch({ok, _}, wasi_nn:run_inference(Backend, Context, "hello")),
    ?assertEqual({ok, done}, wasi_nn:close_execution_context(Backend, Context)),
    {ok, done} = wasi_nn:deinit_backend(Other).

closed_things_are_errors(Config) ->
    Backend = ?config(backend, Config),
    Graph = ?config(graph, Config),
    Context = context(Config),
    {ok, done} = wasi_nn:unload(Backend, Graph),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn:run_inference(Backend, Context, "hello")),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn:init_execution_context(Backend, Graph)),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn:unload(Backend, Graph)),
    {ok, done} = wasi_nn:close_execution_context(Backend, Context),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn:close_execution_context(Backend, Context)),
    {ok, done} = wasi_nn:deinit_backend(Backend),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn:deinit_backend(Backend)),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn:load_by_name(Backend, wasi_nn_test:tiny_model())).

deinit_ends_what_runs(Config) ->
    Backend = ?config(backend, Config),
    Streams = [
        begin
            {ok, Stream} = wasi_nn:stream(Backend, context(Config), "hello", wasi_nn_test:endless()),
            Stream
        end
     || _ <- lists:seq(1, 6)
    ],
    _ = wasi_nn_test:first_token(hd(Streams)),
    {ok, done} = wasi_nn:deinit_backend(Backend),
    _ = [?assertMatch({_, {error, {cancelled, _}}}, wasi_nn_test:collect(Stream)) || Stream <- Streams].

wrong_arguments_are_errors(Config) ->
    Backend = ?config(backend, Config),
    Graph = ?config(graph, Config),
    Context = context(Config),
    Wrong = [
        {invalid_argument, wasi_nn:init_backend({a, tuple})},
        {invalid_argument, wasi_nn:init_backend(#{temperature => self()})},
        {invalid_encoding, wasi_nn:init_backend("no json")},
        {invalid_argument, wasi_nn:init_backend(#{temperature => <<"warm">>})},
        {invalid_argument, wasi_nn:load_by_name(Context, "x")},
        {invalid_argument, wasi_nn:load_by_name(Backend, 7)},
        {model_not_found, wasi_nn:load_by_name(Backend, "/there/is/no.gguf")},
        {invalid_argument, wasi_nn:load_by_name(Backend, "")},
        {invalid_argument, wasi_nn:load_by_name(Backend, <<"model", 0, ".gguf">>)},
        {invalid_argument, wasi_nn:load_by_name(Backend, binary:copy(<<"a/">>, 2048))},
        {invalid_argument, wasi_nn:load_by_name(Backend, binary:copy(<<"a">>, 256))},
        {invalid_argument, wasi_nn:load_by_name_with_config(Backend, "x", <<"{}", 0>>)},
        {invalid_argument, wasi_nn:init_backend(<<"{}", 0>>)},
        {invalid_argument, wasi_nn:init_execution_context_with_session_id(Backend, Graph, <<"ada", 0>>)},
        {invalid_argument, wasi_nn:init_execution_context_with_session_id(Backend, Graph, binary:copy(<<"a">>, 256))},
        {invalid_argument, wasi_nn:run_inference(Backend, Context, "x", <<"{}", 0>>)},
        {invalid_argument, wasi_nn:init_execution_context(Graph, Backend)},
        {invalid_argument, wasi_nn:run_inference(Backend, Context, [self()])},
        {invalid_argument, wasi_nn:run_inference(Backend, Context, <<>>)},
        {invalid_argument, wasi_nn:compute(Backend, context(Config))},
        {invalid_argument, wasi_nn:set_input(Backend, Context, 2, <<"x">>)},
        {invalid_argument, wasi_nn:set_input(Backend, Context, 0, #{})},
        {invalid_argument, wasi_nn:get_output(Backend, Context, -1)},
        {too_large, wasi_nn:run_inference(Backend, Context, binary:copy(<<"x">>, 16#4000001))},
        {too_large, wasi_nn:set_input(Backend, Context, 1, binary:copy(<<" ">>, 16#100001))},
        {prompt_too_long, wasi_nn:run_inference(Backend, Context, binary:copy(<<"x ">>, 16#10000))},
        {invalid_argument, wasi_nn:stream(Backend, Graph, "x")},
        {invalid_argument, wasi_nn:cancel(Backend)},
        {invalid_argument, wasi_nn:status(Graph)},
        {invalid_argument, wasi_nn:unload(Graph, Backend)},
        {invalid_argument, wasi_nn:close_execution_context(Backend, make_ref())}
    ],
    _ = [?assertMatch({Code, {error, {Code, <<_, _/binary>>}}}, {Code, Result}) || {Code, Result} <- Wrong],
    ?assertMatch({ok, _}, wasi_nn:run_inference(Backend, Context, "hello")).

configuration_is_a_map_or_json(Config) ->
    Backend = ?config(backend, Config),
    NTokens = fun(Form) ->
        Context = context(Config),
        {ok, done} = wasi_nn:set_input(Backend, Context, 1, Form),
        {ok, _} = wasi_nn:run_inference(Backend, Context, "hello"),
        {ok, Metadata} = wasi_nn:get_output(Backend, Context, 1),
        {ok, #{<<"output_tokens">> := N}} = wasi_nn_json:decode(Metadata),
        N
    end,
    Forms = [
        #{max_tokens => 4},
        #{<<"max_tokens">> => 4},
        #{stopping => #{max_tokens => 4, stop => [<<"never">>]}},
        <<"{\"max_tokens\": 4}">>,
        "{\"max_tokens\": 4}"
    ],
    ?assertEqual([4, 4, 4, 4, 4], lists:map(NTokens, Forms)).

empty_configuration_changes_nothing(Config) ->
    Backend = ?config(backend, Config),
    Context = context(Config),
    _ = [?assertEqual({ok, done}, wasi_nn:set_input(Backend, Context, 1, Form)) || Form <- [#{}, <<>>, "", "{}"]],
    ?assertEqual(
        wasi_nn:run_inference(Backend, context(Config), "hello"),
        wasi_nn:run_inference(Backend, Context, "hello", #{})
    ),
    {ok, done} = wasi_nn:close_execution_context(Backend, Context),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn:set_input(Backend, Context, 1, #{})).

no_atom_comes_from_input(Config) ->
    Backend = ?config(backend, Config),
    Say = fun(Word) ->
        Key = <<"key_", Word/binary>>,
        {error, _} = wasi_nn:load_by_name(Backend, Word),
        {error, _} = wasi_nn:init_backend(<<"{", Word/binary>>),
        {ok, Named} = wasi_nn:init_execution_context_with_session_id(Backend, ?config(graph, Config), Word),
        {ok, _} = wasi_nn:run_inference(Backend, Named, Word, #{Key => Word}),
        {ok, Stream} = wasi_nn:stream(Backend, Named, Word),
        {_, {done, _}} = wasi_nn_test:collect(Stream),
        {ok, _} = wasi_nn:status(Backend),
        {ok, done} = wasi_nn:close_execution_context(Backend, Named)
    end,
    Say(<<"first">>),
    Before = erlang:system_info(atom_count),
    _ = [Say(<<"novel_", (integer_to_binary(N))/binary>>) || N <- lists:seq(1, 20)],
    ?assertEqual(Before, erlang:system_info(atom_count)).

%% Each prompt has its own text, whoever computes beside it.
calls_of_many_processes_do_not_mix(Config) ->
    Backend = ?config(backend, Config),
    Prompts = [<<"prompt ", (integer_to_binary(N))/binary>> || N <- lists:seq(1, 12)],
    Ask = fun(Prompt) ->
        {ok, Text} = wasi_nn:run_inference(Backend, context(Config), Prompt),
        Text
    end,
    Alone = [Ask(Prompt) || Prompt <- Prompts],
    Parent = self(),
    Asking = [spawn_link(fun() -> Parent ! {self(), Ask(Prompt)} end) || Prompt <- Prompts],
    Together = [receive {Pid, Text} -> Text end || Pid <- Asking],
    ?assertEqual(Alone, Together).

%% Its handles are worth nothing then, and what was open is closed.
a_server_that_dies_is_replaced(Config) ->
    Backend = ?config(backend, Config),
    Context = context(Config),
    {ok, Stream} = wasi_nn:stream(Backend, Context, "hello", wasi_nn_test:endless()),
    _ = wasi_nn_test:first_token(Stream),
    Server = whereis(wasi_nn_server),
    exit(Server, kill),
    IsReplaced = fun() -> is_pid(whereis(wasi_nn_server)) andalso whereis(wasi_nn_server) =/= Server end,
    wasi_nn_test:wait_until(replaced, IsReplaced),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn:run_inference(Backend, Context, "hello")),
    {ok, NewBackend} = wasi_nn:init_backend(wasi_nn_test:config()),
    {ok, Graph} = wasi_nn:load_by_name(NewBackend, wasi_nn_test:tiny_model()),
    {ok, NewContext} = wasi_nn:init_execution_context(NewBackend, Graph),
    ?assertMatch({ok, _}, wasi_nn:run_inference(NewBackend, NewContext, "hello")),
    {ok, done} = wasi_nn:deinit_backend(NewBackend).

a_chat_server(_Config) ->
    {ok, Chat} = chat_server:start_link(wasi_nn_test:tiny_model(), wasi_nn_test:config()),
    Parent = self(),
    Users = [<<"user ", (integer_to_binary(N rem 4))/binary>> || N <- lists:seq(1, 12)],
    Speakers = [spawn_link(fun() -> Parent ! {self(), chat_server:say(Chat, User, <<"hello">>)} end) || User <- Users],
    Answers = [receive {Speaker, Answer} -> Answer end || Speaker <- Speakers],
    _ = [?assertMatch({ok, <<_, _/binary>>}, Answer) || Answer <- Answers],
    ok = chat_server:forget(Chat, <<"user 1">>),
    ok = chat_server:forget(Chat, <<"nobody">>),
    ?assertMatch({ok, _}, chat_server:say(Chat, <<"user 1">>, <<"hello">>)),
    ok = chat_server:stop(Chat).

a_chat_server_goes_on_after_a_limit(_Config) ->
    {ok, Chat} = chat_server:start_link(wasi_nn_test:tiny_model(), (wasi_nn_test:config())#{max_sessions => 1}),
    Answers = [chat_server:say(Chat, User, <<"hello">>) || _ <- [1, 2, 3], User <- [<<"ada">>, <<"bob">>]],
    %% Each session was closed before its user's next message, and begins anew.
    ?assertMatch([{ok, <<_, _/binary>>}], lists:usort(Answers)),
    ok = chat_server:stop(Chat).

a_chat_server_keeps_the_conversation_after_a_wrong_message(_Config) ->
    {ok, Chat} = chat_server:start_link(wasi_nn_test:tiny_model(), wasi_nn_test:config()),
    Say = fun(User, Text) -> chat_server:say(Chat, User, Text) end,
    Undisturbed = [Say(<<"ada">>, <<"hello">>) || _ <- [1, 2]],
    First = Say(<<"bob">>, <<"hello">>),
    ?assertMatch({error, {invalid_argument, _}}, Say(<<"bob">>, <<>>)),
    ?assertEqual(Undisturbed, [First, Say(<<"bob">>, <<"hello">>)]),
    ?assertNotEqual(First, lists:last(Undisturbed)),
    ok = chat_server:stop(Chat).

a_device_of_hyperbeam(_Config) ->
    {ok, Json} = wasi_nn_json:encode(wasi_nn_test:config()),
    Path = wasi_nn_test:tiny_model(),
    {ok, Context} = dev_wasi_nn_nif:init_backend(),
    ok = dev_wasi_nn_nif:load_by_name_with_config(Context, Path, binary_to_list(Json)),
    %% Each of the node's requests is a process of its own.
    In = fun(Work) ->
        {_, Monitor} = spawn_monitor(fun() -> exit({value, Work()}) end),
        receive
            {'DOWN', Monitor, process, _, {value, Value}} -> Value
        end
    end,
    {ok, Session} = In(fun() -> dev_wasi_nn_nif:init_execution_context(Context, "session") end),
    {ok, Text} = In(fun() -> dev_wasi_nn_nif:run_inference(Context, Session, "hello") end),
    ?assert(byte_size(Text) > 0),
    ?assertEqual({ok, Session}, In(fun() -> dev_wasi_nn_nif:init_execution_context_once(Context, "session") end)),
    ok = dev_wasi_nn_nif:set_input(Context, Session, "again"),
    ok = dev_wasi_nn_nif:compute(Context, Session),
    {ok, _} = dev_wasi_nn_nif:get_output(Context, Session, 0),
    {ok, _} = dev_wasi_nn_nif:run_inference_with_options(Context, Session, "and", "{\"max_tokens\": 2}"),
    ok = dev_wasi_nn_nif:close_execution_context(Context, Session),
    ok = dev_wasi_nn_nif:deinit_backend(Context),
    ?assertEqual({error, no_model_loaded}, dev_wasi_nn_nif:get_current_model_info()),
    {ok, Model} = In(fun() -> dev_wasi_nn_nif:switch_model(Path, Json) end),
    {ok, Model} = dev_wasi_nn_nif:switch_model(Path, Json),
    {ok, {Path, Json, Model}} = dev_wasi_nn_nif:get_current_model_info(),
    ok = dev_wasi_nn_nif:cleanup_all_contexts(),
    ok = gen_server:stop(dev_wasi_nn_nif).

a_device_goes_on_after_a_limit(_Config) ->
    {Context, [Ada, Bob]} = open_device(#{max_sessions => 1}),
    Ask = fun(Session) -> dev_wasi_nn_nif:run_inference(Context, Session, "hello") end,
    %% Handles from before, which others have replaced meanwhile, go on as well.
    Answers = [Ask(Session) || _ <- [1, 2, 3], Session <- [Ada, Bob]],
    ?assertMatch([{ok, <<_, _/binary>>}], lists:usort(Answers)),
    {ok, Again} = dev_wasi_nn_nif:init_execution_context(Context, "ada"),
    ?assertMatch({ok, _}, Ask(Again)),
    ok = dev_wasi_nn_nif:set_input(Context, Bob, "hello"),
    ok = dev_wasi_nn_nif:compute(Context, Bob),
    ?assertEqual([dev_wasi_nn_nif:get_output(Context, Bob, 0)], lists:usort(Answers)),
    {ok, #{n_contexts := 2}} = wasi_nn:status(Context),
    ok = dev_wasi_nn_nif:close_execution_context(Context, Ada),
    _ = [?assertMatch({error, {invalid_argument, _}}, Ask(Session)) || Session <- [Ada, Again, none]],
    ?assertMatch({error, {invalid_argument, _}}, dev_wasi_nn_nif:close_execution_context(Context, Ada)),
    ok = dev_wasi_nn_nif:deinit_backend(Context),
    ok = gen_server:stop(dev_wasi_nn_nif).

%% Such as one whose session is asked something wrong.
a_device_leaves_running_calls_alone(_Config) ->
    {Context, [Session, _Other]} = open_device(#{}),
    Ask = fun(Prompt) -> dev_wasi_nn_nif:run_inference(Context, Session, Prompt, wasi_nn_test:endless()) end,
    {_, Monitor} = spawn_monitor(fun() -> exit({value, Ask("hello")}) end),
    wasi_nn_test:wait_until(running, fun() -> count(n_calls, Context) =:= 1 end),
    ?assertMatch({error, {invalid_argument, _}}, Ask("")),
    %% With a cancel it ends, so it was there.
    ?assertEqual({ok, cancelled}, wasi_nn:cancel(element(2, Session))),
    receive
        {'DOWN', Monitor, process, _, {value, Value}} -> ?assertMatch({error, {cancelled, _}}, Value)
    end,
    ok = dev_wasi_nn_nif:deinit_backend(Context),
    ok = gen_server:stop(dev_wasi_nn_nif).

%% Its context, and the sessions ada and bob.
open_device(BackendConfig) ->
    {ok, Context} = dev_wasi_nn_nif:init_backend_with_config(maps:merge(wasi_nn_test:config(), BackendConfig)),
    ok = dev_wasi_nn_nif:load_by_name_with_config(Context, wasi_nn_test:tiny_model(), #{}),
    Open = fun(Name) ->
        {ok, Session} = dev_wasi_nn_nif:init_execution_context(Context, Name),
        Session
    end,
    {Context, [Open("ada"), Open("bob")]}.
