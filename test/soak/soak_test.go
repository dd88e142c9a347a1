package main

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestTwoMinutes is what CI runs of the soak: with the window that is under way when the
// time is up, some two minutes. Every kind of change and fault comes up.
func TestTwoMinutes(t *testing.T) {
	require.NoError(t, run(t.Context(), config{duration: 100 * time.Second, seed: 1, logLevel: "info", out: t.Output()}))
}

func TestADeckDealsEveryCardBeforeAnyComesAgain(t *testing.T) {
	always := func(context.Context, *soak) (string, error) { return "done", nil }
	times := 0
	seldom := func(context.Context, *soak) (string, error) {
		if times++; times < 3 {
			return "", nil
		}
		return "done", nil
	}
	s := &soak{random: rand.New(rand.NewPCG(1, 1)), played: map[string]int{}}
	d := newDeck([]card{{"once", 1, always}, {"twice", 2, always}, {"once more", 1, always}})
	for i := range 5 {
		for range 4 {
			require.NoError(t, s.draw(t.Context(), d))
		}
		require.Equal(t, map[string]int{"once": i + 1, "twice": 2*i + 2, "once more": i + 1}, s.played)
	}
	s.played = map[string]int{}
	d = newDeck([]card{{"always", 3, always}, {"seldom", 1, seldom}})
	for range 4 {
		require.NoError(t, s.draw(t.Context(), d))
	}
	require.Equal(t, 1, s.played["seldom"], "what there is nothing to do for at first stays in the deck")
	d = newDeck([]card{{"never", 1, func(context.Context, *soak) (string, error) { return "", nil }}})
	require.Error(t, s.draw(t.Context(), d))
}

func TestWhatGrowsIsFound(t *testing.T) {
	flat := func(change func(i int, s *sample)) error {
		f := fleet{samples: map[string][]sample{}}
		for i := range 16 {
			s := sample{goroutines: 100 + i%3, descriptors: 12, residentMiB: 70}
			change(i, &s)
			f.samples["leader"] = append(f.samples["leader"], s)
		}
		return f.flat()
	}
	require.NoError(t, flat(func(i int, s *sample) { s.goroutines += 3 * i }), "what is noise")
	require.NoError(t, flat(func(i int, s *sample) { s.residentMiB += i % 4 * 50 }), "what goes again")
	require.EqualError(t, flat(func(i int, s *sample) { s.residentMiB += 10 * i }), "leader: 90 MiB resident in the first quarter, 210 later")
	require.EqualError(t, flat(func(i int, s *sample) { s.goroutines += 50 * (i % 8) }), "leader: 202 goroutines in the first quarter, 451 later")
	require.EqualError(t, flat(func(i int, s *sample) { s.descriptors += i * i }), "leader: 16 file descriptors in the first quarter, 237 later")
}
