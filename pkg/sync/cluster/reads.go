package cluster

import (
	"strconv"
	"sync/atomic"

	"golang.org/x/sync/singleflight"
)

// sharedRead is a read of the API server that those share who need it at the same time.
type sharedRead[T any] struct {
	group singleflight.Group
	turn  chan struct{} // holds a token while none is under way
	begun atomic.Uint64
}

func newSharedRead[T any]() *sharedRead[T] {
	s := &sharedRead[T]{turn: make(chan struct{}, 1)}
	s.turn <- struct{}{}
	return s
}

// do returns what read returns, called here or by another caller, but never before this
// one has asked: who comes while a read is under way shares the next one.
func (s *sharedRead[T]) do(read func() (T, error)) (T, error) {
	result, err, _ := s.group.Do(strconv.FormatUint(s.begun.Load(), 10), func() (any, error) {
		<-s.turn
		defer func() { s.turn <- struct{}{} }()
		s.begun.Add(1)
		return read()
	})
	value, _ := result.(T) // nil where it failed
	return value, err
}
