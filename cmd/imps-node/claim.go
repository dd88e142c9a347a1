package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	authenticationv1client "k8s.io/client-go/kubernetes/typed/authentication/v1"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// nodeClaim is where the API server says which node a token is bound to.
const nodeClaim = "authentication.kubernetes.io/node-name"

// claimTimeout bounds one question to the API server.
const claimTimeout = 10 * time.Second

// duty is one of the duties.
type duty interface {
	// Run works until ctx ends; it returns an error only where going on makes no sense.
	Run(ctx context.Context) error
	// Ready returns why it is not ready, if it is not.
	Ready() error
}

// boundDuty is the node duty. Before it runs, it makes sure that its node is not another
// than that of its token.
type boundDuty struct {
	duty
	node string
	// claim asks the API server for the node of the token; empty where it is bound to none.
	claim func(context.Context) (string, error)
	log   *slog.Logger
}

func (d *boundDuty) Run(ctx context.Context) error {
	node, err := d.awaitClaim(ctx)
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return err
	case node == "":
		d.log.Debug("the token is bound to no node, so that the node's name cannot be checked", "node", d.node)
	case node != d.node:
		return fmt.Errorf("--node-name is %q, but the token is bound to node %q: set it to the Pod's spec.nodeName", d.node, node)
	}
	return d.duty.Run(ctx)
}

// awaitClaim asks until it gets an answer: a node agent must not depend on the API server
// to stay up.
func (d *boundDuty) awaitClaim(ctx context.Context) (node string, err error) {
	backoff := wait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 0.2, Cap: 30 * time.Second, Steps: math.MaxInt}
	warn := sync.OnceFunc(func() {
		d.log.Warn("cannot ask the API server which node the token is bound to, trying again until it answers", "error", impsync.Explain(err))
	})
	err = backoff.DelayFunc().Until(ctx, true, true, func(ctx context.Context) (bool, error) {
		if node, err = d.claim(ctx); err != nil {
			warn()
		}
		return err == nil, nil
	})
	return node, err
}

// claimOf returns the question for the node of the client's own token.
func claimOf(reviews authenticationv1client.SelfSubjectReviewInterface) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, claimTimeout)
		defer cancel()
		review, err := reviews.Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		switch {
		case apierrors.IsForbidden(err), apierrors.IsNotFound(err):
			return "", nil // a cluster that does not tell
		case err != nil:
			return "", err
		}
		switch nodes := review.Status.UserInfo.Extra[nodeClaim]; len(nodes) {
		case 0:
			return "", nil
		case 1:
			return nodes[0], nil
		default:
			return "", errors.New("the API server names more than one node")
		}
	}
}
