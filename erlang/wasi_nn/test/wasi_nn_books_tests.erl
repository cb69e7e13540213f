-module(wasi_nn_books_tests).

-include_lib("eunit/include/eunit.hrl").

%% Backend 1 with graphs 2 and 3; contexts 4 (on 2) and the session 5 (on 3), which is saved or not.
books(IsSaved) ->
    Steps = [
        fun(Books) -> wasi_nn_books:add_backend(1, <<"{}">>, Books) end,
        fun(Books) -> wasi_nn_books:add_graph(2, 1, <<"model">>, <<>>, Books) end,
        fun(Books) -> wasi_nn_books:add_graph(3, 1, <<"other">>, <<"{}">>, Books) end,
        fun(Books) -> wasi_nn_books:add_context(4, 2, <<>>, false, Books) end,
        fun(Books) -> wasi_nn_books:add_context(5, 3, <<"ada">>, IsSaved, Books) end
    ],
    lists:foldl(fun(Step, Books) -> Step(Books) end, wasi_nn_books:new(), Steps).

used(Context, Books) ->
    {ok, Inside} = wasi_nn_books:enter(1, Context, 100, run_inference, Books),
    wasi_nn_books:leave(Context, 100, run_inference, Inside).

everything_is_opened_again_in_order_test() ->
    Books = books(true),
    ?assertEqual([{1, init_backend, [1, <<"{}">>]}], wasi_nn_books:to_restore(backends, Books)),
    ?assertEqual(
        [{2, load_by_name, [1, 2, <<"model">>, <<>>]}, {3, load_by_name, [1, 3, <<"other">>, <<"{}">>]}],
        lists:sort(wasi_nn_books:to_restore(graphs, Books))
    ),
    ?assertEqual(
        [{4, init_execution_context, [2, 4, <<>>]}, {5, init_execution_context, [3, 5, <<"ada">>]}],
        lists:sort(wasi_nn_books:to_restore(contexts, Books))
    ),
    ?assertEqual(
        [{5, init_execution_context, [3, 5, <<"ada">>]}],
        wasi_nn_books:to_restore(contexts, wasi_nn_books:remove_graph(2, Books))
    ).

what_is_closed_is_gone_test() ->
    {Contexts, Books} = wasi_nn_books:remove_backend(1, books(true)),
    ?assertEqual([4, 5], lists:sort(Contexts)),
    ?assertEqual(#{n_backends => 0, n_graphs => 0, n_contexts => 0}, wasi_nn_books:counts(Books)),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn_books:check_graph(1, 2, Books)).

things_belong_to_their_backend_test() ->
    Books = wasi_nn_books:add_backend(9, <<>>, books(true)),
    ?assertMatch({error, {invalid_argument, _}}, wasi_nn_books:check_graph(9, 2, Books)),
    ?assertMatch({error, {invalid_argument, _}, _}, wasi_nn_books:enter(9, 4, 100, compute, Books)),
    ?assertEqual(error, wasi_nn_books:latest_graph(9, Books)),
    ?assertEqual({ok, 3}, wasi_nn_books:latest_graph(1, Books)).

one_call_at_a_time_test() ->
    {ok, Inside} = wasi_nn_books:enter(1, 4, 100, compute, books(true)),
    ?assertEqual({ok, 100}, wasi_nn_books:active_call(4, Inside)),
    ?assertMatch({error, {busy, _}, _}, wasi_nn_books:enter(1, 4, 101, set_input, Inside)),
    ?assertMatch({ok, _}, wasi_nn_books:enter(1, 4, 101, get_output, Inside)),
    ?assertEqual(Inside, wasi_nn_books:leave(4, 101, get_output, Inside)),
    ?assertMatch({ok, _}, wasi_nn_books:enter(1, 4, 101, compute, wasi_nn_books:leave(4, 100, compute, Inside))).

is_told(Context, Books) ->
    case wasi_nn_books:enter(1, Context, 200, run_inference, Books) of
        {error, {restarted, _}, Told} ->
            ?assertMatch({ok, _}, wasi_nn_books:enter(1, Context, 201, run_inference, Told)),
            true;
        {ok, _} ->
            false
    end.

who_lost_something_is_told_test_() ->
    Untouched = fun(Books) -> Books end,
    Used = fun(Books) -> used(4, used(5, Books)) end,
    Inside = fun(Books) ->
        {ok, One} = wasi_nn_books:enter(1, 4, 100, compute, Books),
        {ok, Both} = wasi_nn_books:enter(1, 5, 101, compute, One),
        Both
    end,
    WithPrompt = fun(Books) ->
        {ok, Entered} = wasi_nn_books:enter(1, 5, 100, set_input, Used(Books)),
        wasi_nn_books:leave(5, 100, set_input, Entered)
    end,
    %% What was done, whether the session is saved; whether the users of context 4 and of the session have to be told.
    Cases = [
        {Untouched, true, {false, false}},
        {Untouched, false, {false, false}},
        {Used, true, {true, false}},
        {Used, false, {true, true}},
        {Inside, true, {false, false}},
        {WithPrompt, true, {true, true}}
    ],
    [
        ?_assertEqual(Expected, begin
            Books = wasi_nn_books:replaced(Do(books(IsSaved))),
            {is_told(4, Books), is_told(5, Books)}
        end)
     || {Do, IsSaved, Expected} <- Cases
    ].

a_second_loss_is_not_forgotten_test() ->
    Twice = wasi_nn_books:replaced(wasi_nn_books:replaced(used(4, books(false)))),
    ?assert(is_told(4, Twice)).

whether_it_is_saved_is_known_after_opening_test() ->
    Books = wasi_nn_books:saved(5, true, books(false)),
    ?assertNot(is_told(5, wasi_nn_books:replaced(used(5, Books)))),
    ?assertEqual(Books, wasi_nn_books:saved(77, true, Books)).
