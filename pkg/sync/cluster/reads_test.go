package cluster

import (
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
)

func TestASharedReadIsNeverOlderThanTheQuestion(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		shared := newSharedRead[int64]()
		var reads atomic.Int64
		answer, answers := make(chan struct{}), make(chan int64, 10)
		ask := func() {
			n, err := shared.do(func() (int64, error) {
				n := reads.Add(1)
				<-answer
				return n, nil
			})
			if err == nil {
				answers <- n
			}
		}
		go ask()
		synctest.Wait() // the first is under way
		for range 5 {
			go ask()
		}
		synctest.Wait()
		require.EqualValues(t, 1, reads.Load(), "one at a time")
		answer <- struct{}{}
		require.EqualValues(t, 1, <-answers)
		answer <- struct{}{}
		for range 5 {
			require.EqualValues(t, 2, <-answers, "they share the next one")
		}
		synctest.Wait()
		require.EqualValues(t, 2, reads.Load())
	})
}
