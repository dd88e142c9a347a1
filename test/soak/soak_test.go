package main

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestTwoMinutes is what CI runs of the soak. In two minutes every kind of change and fault
// comes up once.
func TestTwoMinutes(t *testing.T) {
	require.NoError(t, run(t.Context(), config{duration: 2 * time.Minute, seed: 1, logLevel: "info", out: t.Output()}))
}

func TestADeckDealsEveryCardBeforeAnyComesAgain(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 1))
	d := newDeck([]card{{name: "once", times: 1}, {name: "twice", times: 2}, {name: "once more", times: 1}})
	for range 5 {
		dealt := map[string]int{}
		for range 4 {
			dealt[d.next(random).name]++
		}
		require.Equal(t, map[string]int{"once": 1, "twice": 2, "once more": 1}, dealt)
	}
}

func TestQuartersCompareTheBeginningWithTheEnd(t *testing.T) {
	f := fleet{samples: map[string][]sample{"leader": {}}}
	for i := range 16 {
		f.samples["leader"] = append(f.samples["leader"], sample{goroutines: 100 + 5*i, descriptors: 12, residentMiB: 70})
	}
	require.NoError(t, f.flat(), "it grows, but by less than what is noise")
	for i := range 16 {
		f.samples["leader"][i].goroutines = 100 + 10*i
	}
	require.EqualError(t, f.flat(), "leader: 120 goroutines in the first quarter, 240 in the last")
}
